"""Machines by name, and their devices as the machine's compiler describes them. Importing this file needs no JAX."""

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from flmjax.config import ConfigError
from flmjax.hardware import PlannableChip, chip_of

if TYPE_CHECKING:
    import jax

NODE_SIZE = 8  # GPUs that NVLink joins
# Share of a device's memory that a program can use: the driver, communication buffers and, on GPUs, the workspace of
# cuDNN take the rest, and no compiler counts them.
USABLE = {"cuda": 0.92, "tpu": 0.96}
PACKAGES = {"cuda": "flmjax[plan-gpu]", "tpu": "flmjax[plan-tpu]"}  # of the compilers

# name: (JAX's name of the device, options, shape of an example, chips of a pod)
_TPUS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "v4": ("TPU v4", {"chip_config_name": "megacore"}, "4x8x8", 4096),  # a chip is one device, as on a pod
    "v5p": ("TPU v5", {}, "4x8x8", 8960),
    "v5e": ("TPU v5 lite", {}, "16x16", 256),
    "v6e": ("TPU v6 lite", {}, "16x16", 256),
}
_GPUS = {"a100": "NVIDIA A100-SXM4-80GB", "a800": "NVIDIA A800-SXM4-80GB"}
CHOICES = tuple(f"{name}:NODESx{NODE_SIZE}" for name in _GPUS) + tuple(f"{n}:{t[2]}" for n, t in _TPUS.items())

# The description of an A100 for XLA's GPU compiler, which has no device to query.
_AMPERE = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 167936
  threads_per_core_limit: 2048
  core_count: 108
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 2039000000000
  l2_cache_size: 41943040
  clock_rate_ghz: 1.41
  device_memory_size: 85899345920
  shared_memory_per_block_optin: 166912
  cuda_compute_capability {{ major: 8 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{kind}"
"""


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
        arguments: of jax.experimental.topologies.get_topology_desc.
    """

    name: str
    platform: str
    chip: PlannableChip
    num_devices: int
    node_size: int
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def usable(self) -> float:
        """Bytes of a device that a program can use."""
        return USABLE[self.platform] * self.chip.memory


def parse_topology(name: str | None) -> Topology:
    """The machine with the name `name`.

    Raises:
        ConfigError: without a name, for a name that is unknown (lists the choices), and for more chips than a pod has.
    """
    if name is None:
        raise ConfigError("mesh.topology is None; name the machine: --config.mesh.topology=a800:24x8")
    family, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    if family in _GPUS and len(sizes) == 2 and sizes[1] == NODE_SIZE:
        arguments = {"platform": "cuda", "topology_name": family, "topology": f"1x{sizes[0]}x{NODE_SIZE}"}
        arguments["target_config"] = _AMPERE.format(kind=_GPUS[family])
        return Topology(name, "cuda", _chip(_GPUS[family]), math.prod(sizes), NODE_SIZE, arguments)
    if family in _TPUS and len(sizes) == len(_TPUS[family][2].split("x")):
        kind, options, _, most = _TPUS[family]
        if math.prod(sizes) > most:
            raise ConfigError(f"mesh.topology='{name}' has {math.prod(sizes)} chips; a pod of {family} has {most}")
        arguments = {"platform": "tpu", "topology_name": name, **options}
        return Topology(name, "tpu", _chip(kind), math.prod(sizes), math.prod(sizes), arguments)
    raise ConfigError(
        f"mesh.topology='{name}' is not a known machine; choices: {', '.join(CHOICES)}, and the same in other sizes"
    )


def devices_of(topology: Topology) -> "list[jax.Device] | None":
    """The machine's devices, to compile for; None where the package of its compiler is missing.

    Raises:
        ConfigError: for a shape that the compiler refuses.
    """
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


def _chip(kind: str) -> PlannableChip:
    chip = chip_of(kind)
    assert isinstance(chip, PlannableChip), f"the data sheet of {kind} is incomplete"
    return chip
