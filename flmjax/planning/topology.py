"""Machines by name, and their devices as the machine's compiler describes them. Importing this file needs no JAX."""

import dataclasses
import math
import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from flmjax.config import ConfigError
from flmjax.hardware import PlannableChip, chip_of

if TYPE_CHECKING:
    import jax

# Share of a device's memory that a program can use: the driver, communication buffers and, on GPUs, the workspace of
# cuDNN take the rest, and no compiler counts them.
USABLE = {"cuda": 0.92, "tpu": 0.96}
PACKAGES = {"cuda": "flmjax[plan-gpu]", "tpu": "flmjax[plan-tpu]"}  # of the compilers
XLA_PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}  # JAX's names of the devices' platforms


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as XLA's compiler describes it, which has no device to query.

    Attributes:
        name: of the device.
        capability: major compute capability; 9 and later ones have the instructions of their architecture alone.
        cores, fpus: streaming multiprocessors, and floating-point units of each.
        clock: GHz.
        bandwidth, memory: bytes/s and bytes of HBM.
        l2_cache, shared_memory: bytes, of the chip and of one core.
        host_size: GPUs of a host.
        node_size: GPUs that NVLink joins.
    """

    name: str
    capability: int
    cores: int
    fpus: int
    clock: float
    bandwidth: int
    memory: int
    l2_cache: int
    shared_memory: int
    host_size: int = 8
    node_size: int = 8

    @property
    def target_config(self) -> str:
        """The description for the compiler; fields that are alike in all rows are those of every file of the source."""
        features = " feature_extension: ACCELERATED_FEATURES" if self.capability >= 9 else ""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_memory - 1024}
  cuda_compute_capability {{ major: {self.capability}{features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{self.name}"
"""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU as its compiler describes it.

    Attributes:
        name: the device kind. compiler_name: of the family in topology_name.
        example: shape of a slice, in chips.
        pod: most chips of a slice.
        devices: JAX's devices in a chip.
        options: further arguments of get_topology_desc.
    """

    name: str
    compiler_name: str
    example: str
    pod: int
    devices: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# Source of the numbers: openxla/xla, xla/backends/gpu/target_config/specs/*.txtpb.
_GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 2039 * 10**9, 85899345920, 41943040, 167936),
    "a800": Gpu("NVIDIA A800-SXM4-80GB", 8, 108, 64, 1.41, 2039 * 10**9, 85899345920, 41943040, 167936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 3352320 * 10**6, 84942979072, 52428800, 233472),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 9, 132, 128, 1.98, 4800 * 10**9, 151397597184, 52428800, 233472),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 7672320 * 10**6, 191514411008, 132644864, 233472),
    # 18 hosts of 4 GPUs are one NVLink domain (GB200 NVL72).
    "gb200": Gpu("NVIDIA GB200", 10, 152, 128, 2.062, 7928064 * 10**6, 197897748480, 135528448, 233472, 4, 72),
}
_TPUS = {
    # A megacore is both cores of a chip as one device, as on a pod.
    "v4": Tpu("TPU v4", "v4", "4x8x8", 4096, options={"chip_config_name": "megacore"}),
    "v5p": Tpu("TPU v5", "v5p", "4x8x8", 8960),
    "v5e": Tpu("TPU v5 lite", "v5e", "16x16", 256),
    "v6e": Tpu("TPU v6 lite", "v6e", "16x16", 256),
    "v7x": Tpu("TPU7x", "tpu7x", "4x4x8", 9216, devices=2),  # Ironwood
}
CHOICES = tuple(f"{name}:HOSTSx{gpu.host_size}" for name, gpu in _GPUS.items())
CHOICES += tuple(f"{name}:{tpu.example}" for name, tpu in _TPUS.items())


class TooLargeError(RuntimeError):
    """A program that does not fit the memory of its devices; the message has its name, its size and what to change."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to plan for.

    Attributes:
        name: as in MeshConfig.topology.
        platform: "cuda" or "tpu".
        chip: the data sheet of one device.
        num_devices: devices of the machine.
        node_size: consecutive devices that intra-node links join; all devices of a TPU's slice.
        slices: of TPUs, joined by the data-centre network; 1 for GPUs.
        arguments: of jax.experimental.topologies.get_topology_desc.
    """

    name: str
    platform: str
    chip: PlannableChip
    num_devices: int
    node_size: int
    slices: int = 1
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def usable(self) -> float:
        """Bytes of a device that a program can use."""
        return USABLE[self.platform] * self.chip.memory


def parse_topology(name: str | None) -> Topology:
    """The machine with the name `name`.

    Raises:
        ConfigError: without a name, for a name that is unknown (lists the choices), and for more chips in a slice than
            a pod has.
    """
    if name is None:
        raise ConfigError("mesh.topology is None; name the machine: --config.mesh.topology=a800:24x8")
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?:\*([1-9]\d*))?", name)
    family, shape, count = match.groups() if match else ("", "", None)
    sizes = [int(size) for size in shape.split("x")] if shape else []
    gpu, tpu, slices = _GPUS.get(family), _TPUS.get(family), int(count or 1)
    if gpu is not None and len(sizes) == 2 and sizes[1] == gpu.host_size and count is None:
        arguments = {"platform": "cuda", "topology_name": family, "topology": f"1x{shape}"}
        arguments["target_config"] = gpu.target_config
        return Topology(name, "cuda", _chip(gpu.name), math.prod(sizes), gpu.node_size, arguments=arguments)
    if tpu is not None and len(sizes) == len(tpu.example.split("x")):
        if math.prod(sizes) > tpu.pod:
            raise ConfigError(f"mesh.topology='{name}' has {math.prod(sizes)} chips; a pod of {family} has {tpu.pod}")
        arguments = {"platform": "tpu", "topology_name": f"{tpu.compiler_name}:{shape}", **tpu.options}
        arguments |= {"num_slices": slices} if slices > 1 else {}
        devices = math.prod(sizes) * tpu.devices  # of a slice
        return Topology(name, "tpu", _chip(tpu.name), slices * devices, devices, slices, arguments)
    if gpu is not None and len(sizes) == 2 and count is None:
        raise ConfigError(
            f"mesh.topology='{name}' has hosts of {sizes[1]} GPUs; those of {family} have {gpu.host_size}: "
            f"{family}:{sizes[0]}x{gpu.host_size}"
        )
    raise ConfigError(
        f"mesh.topology='{name}' is not a known machine; choices: {', '.join(CHOICES)}, the same in other sizes, and "
        "several slices of TPUs: v5p:4x8x8*2"
    )


def devices_of(topology: Topology) -> "list[jax.Device] | None":
    """The machine's devices, to compile for; None where the package of its compiler is missing.

    Raises:
        ConfigError: for a shape that the compiler refuses, and for a compiler of another version than JAX's.
    """
    _check_version(topology.platform)
    from jax.experimental import topologies  # not at the top: a cost alone needs no JAX

    try:
        devices = list(topologies.get_topology_desc(**topology.arguments).devices)
    except NotImplementedError:  # JAX's answer without the CUDA plugin
        return None
    except (RuntimeError, ValueError) as error:
        if "not installed" in str(error):  # JAX's answer without libtpu
            return None
        raise ConfigError(f"mesh.topology='{topology.name}': its compiler refuses it: {error}") from error
    if len(devices) != topology.num_devices:
        raise ConfigError(f"mesh.topology='{topology.name}' has {len(devices)} devices, not {topology.num_devices}")
    return devices


def _check_version(platform: str) -> None:
    """Refuse a compiler of another version than the installed JAX asks for: its programs could not be read."""
    extra, package = {"cuda": ("cuda12", "jax-cuda12-plugin"), "tpu": ("tpu", "libtpu")}[platform]
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return
    for needed in map(Requirement, metadata.requires("jax") or ()):
        is_package = needed.name == package and needed.marker is not None and needed.marker.evaluate({"extra": extra})
        if is_package and not needed.specifier.contains(installed, prereleases=True):
            raise ConfigError(
                f"{package} {installed} does not belong to jax {metadata.version('jax')}; "
                f"pip install '{package}{needed.specifier}'"
            )


def _chip(kind: str) -> PlannableChip:
    chip = chip_of(kind)
    assert isinstance(chip, PlannableChip), f"the data sheet of {kind} is incomplete"
    return chip
