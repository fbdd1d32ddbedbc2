"""Machines that are not here: their devices as the compiler knows them."""

import dataclasses
import math
import re
from typing import Any

from flmjax.config import ConfigError
from flmjax.hardware import Chip, chip_of

NODE = 8  # GPUs that NVLink joins
# Of a device's memory, what a program can have: the rest is for the driver, communication buffers and, on GPUs, the
# workspace of cuDNN, which is in no compiler's count.
USABLE = {"cuda": 0.92, "tpu": 0.96}
PACKAGES = {"cuda": "flmjax[plan-gpu]", "tpu": "flmjax[plan-tpu]"}  # that bring the compilers

# name: (what JAX calls the chip, options, shape of an example, chips of a pod)
_TPUS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "v4": ("TPU v4", {"chip_config_name": "megacore"}, "4x8x8", 4096),  # a chip is one device, as on a pod
    "v5p": ("TPU v5", {}, "4x8x8", 8960),
    "v5e": ("TPU v5 lite", {}, "16x16", 256),
    "v6e": ("TPU v6 lite", {}, "16x16", 256),
}
_GPUS = {"a100": "NVIDIA A100-SXM4-80GB", "a800": "NVIDIA A800-SXM4-80GB"}
CHOICES = tuple(f"{name}:NODESx{NODE}" for name in _GPUS) + tuple(f"{n}:{t[2]}" for n, t in _TPUS.items())

# An A100 for XLA's GPU compiler, which is given no device to ask.
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
    """A program that the machine's compiler refuses for its memory; says how much."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine by name.

    Attributes:
        name: as in MeshConfig.topology.
        platform: "cuda" or "tpu".
        chip: of one device.
        num_devices: all of them.
        node: consecutive devices that are near each other; a TPU's are all.
        arguments: what get_topology_desc takes.
    """

    name: str
    platform: str
    chip: Chip
    num_devices: int
    node: int
    arguments: dict[str, Any]


def parse_topology(name: str) -> Topology:
    """The machine that `name` means.

    Raises:
        ConfigError: for a name that is none; lists those there are.
    """
    family, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    choices = f"choices: {', '.join(CHOICES)}, and other sizes of them"
    if family in _GPUS and len(sizes) == 2 and sizes[1] == NODE:
        arguments = {"platform": "cuda", "topology_name": family, "topology": f"1x{sizes[0]}x{NODE}"}
        arguments["target_config"] = _AMPERE.format(kind=_GPUS[family])
        return Topology(name, "cuda", _chip(_GPUS[family]), math.prod(sizes), NODE, arguments)
    if family in _TPUS and len(sizes) == len(_TPUS[family][2].split("x")):
        kind, options, _, most = _TPUS[family]
        if math.prod(sizes) > most:
            raise ConfigError(f"mesh.topology='{name}' has {math.prod(sizes)} chips; a pod of {family} has {most}")
        arguments = {"platform": "tpu", "topology_name": name, **options}
        return Topology(name, "tpu", _chip(kind), math.prod(sizes), math.prod(sizes), arguments)
    raise ConfigError(f"mesh.topology='{name}' is no machine that can be planned for; {choices}")


def devices_of(topology: Topology) -> list[Any] | None:
    """Its devices, to compile for; None where the compiler's package is missing.

    Raises:
        ConfigError: when the compiler knows no such shape.
    """
    from jax.experimental import topologies  # imported here: a cost alone needs no JAX

    try:
        devices = list(topologies.get_topology_desc(**topology.arguments).devices)
    except NotImplementedError:  # what JAX says without the CUDA plugin
        return None
    except (RuntimeError, ValueError) as error:
        if "not installed" in str(error):  # and without libtpu
            return None
        raise ConfigError(f"mesh.topology='{topology.name}': its compiler refuses it: {error}") from error
    if len(devices) != topology.num_devices:
        raise ConfigError(f"mesh.topology='{topology.name}' has {len(devices)} devices, not {topology.num_devices}")
    return devices


def _chip(kind: str) -> Chip:
    chip = chip_of(kind)
    assert chip is not None
    return chip
