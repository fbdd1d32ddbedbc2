"""A compiled program of a run: its size on one device, and what to change when it does not fit."""

import dataclasses

from flmjax.hardware import GiB, PlannableChip
from flmjax.planning.exchanges import Collective, Timeline


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled training step, growth or certificate; bytes and FLOPs are those of one device.

    Attributes:
        name: of the program in messages, as in "growth 16B -> 51B".
        advice: the cheapest change of the config that makes the program smaller.
        arguments, outputs, aliased, temporaries: bytes; aliased outputs take the place of their arguments.
        peak: most bytes in use at once, as the compiler counts them.
        matmul_flops: FLOPs of the executed matrix products, recomputed ones included.
        attention_products: of the executed kernels of fused attention, in the unit of exchanges.Work.attention.
        collectives: exchanges with other devices.
        timelines: the schedules of the computations that have collectives.
        rematerialisations: "involuntary" ones in the partitioner's warnings: arrays gathered completely to be cut anew.
        compile_seconds: time of lowering and compilation.
    """

    name: str
    advice: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    matmul_flops: float
    collectives: tuple[Collective, ...]
    rematerialisations: int
    compile_seconds: float
    attention_products: float = 0.0
    timelines: tuple[Timeline, ...] = ()

    def fits(self, usable: float) -> bool:
        """Whether the peak is at most `usable` bytes."""
        return self.peak <= usable

    def refusal(self, chip: PlannableChip, usable: float) -> str | None:
        """Why the program does not fit, and what to change; None if its peak is at most `usable` bytes of the chip."""
        if self.fits(usable):
            return None
        return (
            f"{self.name} needs {self.peak / GiB:.1f} GiB a device; {chip.kind} has {chip.memory / GiB:.0f} GiB, of "
            f"which programs can use {usable / GiB:.1f}: {self.advice}"
        )
