"""Figures of accelerators, from their vendors' data sheets or measured. Importing this file does not import JAX.

FLOP/s is a rate of floating-point operations; bandwidths are in bytes/s, those of links in each direction.
"""

import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

GiB = 2**30

# Device nodes of the drivers: an NVIDIA GPU is visible to JAX if one of these is (jax/_src/hardware_utils.py); a TPU's
# driver is accel (v2 to v4) or vfio.
_NVIDIA_NODES = ("nvidia0", "nvidiactl", "dxg")
_TPU_NODES = ("accel*", "vfio/*")
# The modules that JAX loads for a kind of device, and the nodes of the devices.
_PLUGINS = {
    "jax_plugins.xla_cuda12": _NVIDIA_NODES,
    "jax_plugins.xla_cuda13": _NVIDIA_NODES,
    "jax_cuda12_plugin": _NVIDIA_NODES,
    "jax_cuda13_plugin": _NVIDIA_NODES,
    "libtpu": _TPU_NODES,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one device; memory and links may be unknown.

    Attributes:
        kind: part of the name that JAX has for the device.
        bfloat16, float32: dense peaks of matrix multiplications in FLOP/s. JAX multiplies float32 matrices in TF32 on
            these GPUs and in one bfloat16 pass on TPUs unless told otherwise.
        memory: bytes of HBM; None: unknown.
        bandwidth: bytes/s of HBM; None: unknown.
        intra_node: bytes/s to the devices of the same node (GPU: NVLink) or along one axis of the torus (TPU: ICI);
            None: unknown.
        inter_node: bytes/s to other nodes, or to other slices of TPUs (data-centre network); None: unknown.
        watts: thermal design power, of a TPU the largest measured power (arXiv 2304.01433); None: not published.
    """

    kind: str
    bfloat16: float
    float32: float
    memory: int | None = None
    bandwidth: float | None = None
    intra_node: float | None = None
    inter_node: float | None = None
    watts: float | None = None


@dataclasses.dataclass(frozen=True)
class PlannableChip(Chip):
    """A chip whose memory and links are known, so that runs can be planned for it."""

    memory: int
    bandwidth: float
    intra_node: float
    inter_node: float


# NVIDIA's data sheets, dense rates; NVLink is half of the quoted two-way figure. Between nodes a GPU has a port of 200
# Gb/s (A100, A800) or 400 Gb/s (later ones), as in DGX systems and their reference clusters. TPUs: Google's table on
# the page of TPU7x, where a row is that of a chip; links of an axis as in "How to scale your model", chapter 2, and for
# TPU7x those of v5p, since both have 1,200 GB/s a chip in Google's table.
A800 = PlannableChip("A800", 312e12, 156e12, 80 * GiB, 2039e9, 200e9, 25e9, 400.0)
# The first chip whose kind is part of a device's name is that device's. An A800 is an A100 with 8 of 12 NVLinks.
CHIPS = (
    PlannableChip("A100", 312e12, 156e12, 80 * GiB, 2039e9, 300e9, 25e9, 400.0),
    A800,
    Chip("H100 PCIe", 756e12, 378e12),
    Chip("H100 NVL", 835e12, 418e12),
    PlannableChip("H100", 989e12, 495e12, 84_942_979_072, 3352e9, 450e9, 50e9, 700.0),
    PlannableChip("H200", 989e12, 495e12, 151_397_597_184, 4800e9, 450e9, 50e9, 700.0),
    PlannableChip("GB200", 2500e12, 1250e12, 197_897_748_480, 7928e9, 900e9, 50e9, 1200.0),
    PlannableChip("B200", 2250e12, 1125e12, 191_514_411_008, 7672e9, 900e9, 50e9, 1000.0),
    Chip("TPU v4 lite", 138e12, 138e12),
    PlannableChip("TPU v4", 275e12, 275e12, 32 * GiB, 1228e9, 90e9, 6.25e9, 192.0),  # network: v5p's, none is published
    PlannableChip("TPU v5 lite", 197e12, 197e12, 16 * GiB, 819e9, 90e9, 3.125e9),  # network: page of v6e
    PlannableChip("TPU v5e", 197e12, 197e12, 16 * GiB, 819e9, 90e9, 3.125e9),
    PlannableChip("TPU v5", 459e12, 459e12, 95 * GiB, 2765e9, 180e9, 6.25e9),
    PlannableChip("TPU v6", 918e12, 918e12, 32 * GiB, 1640e9, 180e9, 12.5e9),
    PlannableChip("TPU7x", 1153.5e12, 1153.5e12, 96 * GiB, 3690e9, 90e9, 6.25e9),  # a device is half of a chip
)


# Options of XLA's compilers that let exchanges between devices run behind computation; they change no result. Without
# them the step of FLM-101B on 192 A800s (mesh 3 x 16 x 4) hides 0.3 of 21.0 s of exchanges, with the scheduler 7.4 s in
# 1.3 GiB less (compiled, not run). Left out: xla_gpu_enable_pipelined_all_gather repeats 9 % of that step's FLOPs and
# takes 8 GiB, xla_gpu_enable_pipelined_reduce_scatter changes nothing, and double-buffered loops hide less. The TPU's
# are those that MaxText sets for collectives inside matrix products.
_OVERLAP_OPTIONS: dict[str, dict[str, bool]] = {
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}


# Options of XLA that make a program's results the same in every execution: GPUs add in an order that changes (atomic
# operations of scatters and of some reductions), and choose kernels by measured times.
_DETERMINISTIC_OPTIONS: dict[str, dict[str, bool]] = {
    "gpu": {"xla_gpu_deterministic_ops": True, "xla_gpu_exclude_nondeterministic_ops": True},
}


def compiler_options(platform: str, overlap_collectives: bool = True, deterministic: bool = False) -> dict[str, bool]:
    """Options of XLA for the programs of training, to be passed to jax.jit; none for CPUs.

    Args:
        platform: "gpu", "tpu" or "cpu", of the devices.
        overlap_collectives: whether exchanges between devices may run behind computation (RunConfig).
        deterministic: whether results must be the same in every execution (RunConfig).
    """
    chosen = [(_OVERLAP_OPTIONS, overlap_collectives), (_DETERMINISTIC_OPTIONS, deterministic)]
    return {name: value for table, is_set in chosen if is_set for name, value in table.get(platform, {}).items()}


def chip_of(device_kind: str) -> Chip | None:
    """The data sheet of a device that JAX calls `device_kind`; None for a device without one."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)


def peak_flops(device: "jax.Device", dtype: str) -> tuple[float, str]:
    """The peak rate of one device in matrix multiplications, and its source.

    Devices and types without a data sheet are measured, in float32. Fake host devices share one machine: the measured
    rate of one device is that of the machine.

    Args:
        device: local; a device that is only compiled for cannot be measured.
        dtype: of the matrices.

    Returns:
        (FLOP/s, a text that names the data sheet or the measurement).
    """
    import jax.numpy as jnp

    chip, dtype = chip_of(device.device_kind), jnp.dtype(dtype).name
    if chip is not None and dtype in ("bfloat16", "float32"):
        return getattr(chip, dtype), f"data sheet of {chip.kind}, {dtype}"
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    source = (
        f"measured on this machine: fastest of many 1024 x 1024 float32 matrix multiplications on {device.device_kind}"
        f"; a busy machine measures less, and utilisation looks too high; load {load:.1f} on {cores} cores"
    )
    return _measured_flops(device), source


def _measured_flops(device: "jax.Device", size: int = 1024, budget_seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of several multiplications, each of 2 size^3 FLOPs."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x = jax.device_put(np.full((size, size), 0.5, np.float32), device)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()  # compiles
    best, end = math.inf, time.perf_counter() + budget_seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def hide_plugins(nodes: Path = Path("/dev")) -> None:
    """Hide JAX's plug-ins for devices that this machine lacks from JAX, which must not be imported yet.

    JAX would load them and pass on in many lines that there is no device. Without a device they are compilers, of use
    to `flmjax plan` alone. Platforms that the environment variable JAX_PLATFORMS demands are left to JAX.

    Args:
        nodes: the folder of device nodes.
    """
    if (os.environ.get("JAX_PLATFORMS") or "cpu") != "cpu":
        return
    for name, patterns in _PLUGINS.items():
        if not any(any(nodes.glob(pattern)) for pattern in patterns):
            sys.modules.setdefault(name, _EmptyPlugin(name))


class _EmptyPlugin(ModuleType):
    """A plug-in that registers no device; its submodules cannot be imported."""

    def initialize(self) -> None:
        """Register nothing; JAX calls it of the modules in `jax_plugins`."""

    def get_library_path(self) -> None:
        """No library; JAX calls it of `libtpu`."""
