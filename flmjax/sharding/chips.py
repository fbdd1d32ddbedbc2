"""What accelerators can do, from their vendors' data sheets: no JAX."""

import dataclasses

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        kind: what the name that JAX gives the device holds.
        bfloat16, float32: dense peaks of matrix multiplications in FLOP/s. JAX multiplies float32 matrices in TF32 on
            these GPUs and in one bfloat16 pass on TPUs unless told otherwise.
        memory: bytes. bandwidth: of it, bytes/s.
        near: bytes/s each way to the devices of its node (GPU: NVLink) or along an axis of the torus (TPU).
        far: bytes/s each way to other nodes; a TPU's slice has none.
        watts: thermal design power; of a TPU the largest measured (arXiv 2304.01433), where it is published.
    """

    kind: str
    bfloat16: float
    float32: float
    memory: int = 0
    bandwidth: float = 0.0
    near: float = 0.0
    far: float = 0.0
    watts: float | None = None


A800 = Chip("A800", 312e12, 156e12, 80 * GiB, 2039e9, 200e9, 25e9, 400.0)
# The first whose kind is in the device's name counts. An A800 is an A100 with 8 of 12 NVLinks.
CHIPS = (
    Chip("A100", 312e12, 156e12, 80 * GiB, 2039e9, 300e9, 25e9, 400.0),
    A800,
    Chip("H100 PCIe", 756e12, 378e12),
    Chip("H100 NVL", 835e12, 418e12),
    Chip("H100", 989e12, 495e12),
    Chip("H200", 989e12, 495e12),
    Chip("TPU v4 lite", 138e12, 138e12),
    Chip("TPU v4", 275e12, 275e12, 32 * GiB, 1228e9, 90e9, watts=192.0),
    Chip("TPU v5 lite", 197e12, 197e12, 16 * GiB, 819e9, 90e9),
    Chip("TPU v5e", 197e12, 197e12, 16 * GiB, 819e9, 90e9),
    Chip("TPU v5", 459e12, 459e12, 95 * GiB, 2765e9, 180e9),
    Chip("TPU v6", 918e12, 918e12, 32 * GiB, 1640e9, 180e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The data sheet of a device that JAX calls `device_kind`, if there is one."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)
