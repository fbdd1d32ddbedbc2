"""The plan of a run: memory, time and price of every stage and every growth on a machine. This file needs no JAX."""

import dataclasses
import itertools
from typing import Any

from flmjax.config import GradientReduction, MeshShape, Remat
from flmjax.hardware import PlannableChip
from flmjax.planning.calendar import Calendar, Operation
from flmjax.planning.cost import Bill, Published, StageCost
from flmjax.planning.program import Program
from flmjax.planning.roofline import StepTime


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """The evaluations of a stage.

    Attributes:
        program: sums of the loss over one batch, beside the training state.
        seconds: of one evaluation of all its batches.
        number: in the stage.
    """

    program: Program
    seconds: float
    number: int


@dataclasses.dataclass(frozen=True)
class Saves:
    """The checkpoints of a stage, in bytes and seconds.

    Attributes:
        bytes: of one checkpoint.
        kept: number of the stage's checkpoints on disk at its end. stay: those of them that are kept for ever.
        pause: of the run for a save. written: until the save is complete on disk.
        interval: of work between two saves, by the settings.
        best: interval that loses the least time, never shorter than a save takes.
        restart: from a failure until the run works again.
    """

    bytes: float
    kept: int
    stay: int
    pause: float
    written: float
    interval: float
    best: float
    restart: float


@dataclasses.dataclass(frozen=True)
class SumCost:
    """Sums of the gradients over the replicas in a step: bytes that a device sends, and seconds of its links."""

    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class ReplicaSums:
    """When a stage sums its gradients over the replicas of its mesh, and the costs of both settings, by arithmetic.

    Attributes:
        reduction: the stage's setting.
        step, microbatch: costs of one sum in a step, and of one in every microbatch.
    """

    reduction: GradientReduction
    step: SumCost
    microbatch: SumCost


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage on the machine; FLOPs, bytes and times are those of one update.

    Attributes:
        cost: of all updates of the stage.
        batch_size: sequences. microbatches: parts of a batch.
        mesh, remat: of the stage's layout. attention: the backend.
        program: the training step, on one device.
        attention_flops: of the fused attention kernels on one device, which the program's text does not show.
        model_flops: of all devices, by FLOPS_CONVENTION.
        step: estimated time.
        bill: of all updates of the stage at the estimated step time.
        evaluations, saves: pauses of the stage.
        published: the paper's figures of the stage; None for other stages than the paper's.
        replica_sums: None where the mesh has one replica or the batch one microbatch: there is no choice.
    """

    cost: StageCost
    batch_size: int
    microbatches: int
    mesh: MeshShape
    remat: Remat
    attention: str
    program: Program
    attention_flops: float
    model_flops: float
    step: StepTime
    bill: Bill
    evaluations: Evaluations
    saves: Saves
    published: Published | None
    replica_sums: ReplicaSums | None = None

    @property
    def executed_flops(self) -> float:
        """FLOPs of one device, recomputed layers included."""
        return self.program.matmul_flops + self.attention_flops


@dataclasses.dataclass(frozen=True)
class GrowthPlan:
    """The growth from one stage to the next; old and new state are in memory at once.

    Attributes:
        seconds: estimated time of the growth.
        certificate: the comparison of both models after the growth.
        certificate_seconds: estimated time of the certificate.
    """

    from_stage: str
    to_stage: str
    program: Program
    seconds: float
    certificate: Program
    certificate_seconds: float

    @property
    def programs(self) -> tuple[Program, ...]:
        """The growth and its certificate."""
        return self.program, self.certificate


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a machine.

    Attributes:
        topology, platform, chip, devices: of the machine.
        is_exact: False where programs were compiled for fake CPU devices: bytes and times are not the machine's.
        usable: bytes of a device that a program can use.
        total: bill of the steps alone.
        calendar: days with evaluations, growths, saves and failures. expected: bill of its expected days.
        operation: assumptions of the calendar.
        saved: share of FLOPs that the schedule saves at equal tokens.
        saved_days: share of days that it saves at equal tokens and speed.
        compiler_options: names of XLA's options that the steps are compiled with.
        remarks: on programs that fit but could be faster, and on costs that are not in the plan.
    """

    topology: str
    platform: str
    chip: PlannableChip
    devices: int
    is_exact: bool
    usable: float
    stages: tuple[StagePlan, ...]
    growths: tuple[GrowthPlan, ...]
    total: Bill
    calendar: Calendar
    expected: Bill
    operation: Operation
    saved: float
    saved_days: float
    remarks: tuple[str, ...]
    compiler_options: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs: the steps and evaluations, then each growth with its certificate."""
        steps = (program for stage in self.stages for program in (stage.program, stage.evaluations.program))
        return (*steps, *(program for growth in self.growths for program in growth.programs))

    @property
    def refusals(self) -> tuple[str, ...]:
        """A line for each program that does not fit; none for those of fake devices, whose memory is not known."""
        refusals = [program.refusal(self.chip, self.usable) for program in self.programs] if self.is_exact else []
        return tuple(refusal for refusal in refusals if refusal is not None)

    @property
    def checkpoint_bytes(self) -> float:
        """Most bytes of checkpoints on disk: at a stage's end, with those of earlier stages that are kept for ever."""
        saves = [stage.saves for stage in self.stages]
        staying = itertools.accumulate((x.bytes * x.stay for x in saves), initial=0.0)
        return max(x.bytes * x.kept + earlier for x, earlier in zip(saves, staying, strict=False))

    def tflops(self, stage: StagePlan) -> float:
        """Model TFLOP/s of one device as the paper counts them: attention in full, nothing twice."""
        return stage.cost.flops / stage.cost.steps / stage.step.seconds / self.devices / 1e12

    def to_json(self) -> dict[str, Any]:
        """Plain nested dictionary, derived figures included."""
        tree = dataclasses.asdict(self)
        for part in (*tree["stages"], *(stage["evaluations"] for stage in tree["stages"]), *tree["growths"]):
            for program in (part["program"], part.get("certificate")):
                if program is not None:
                    del program["timelines"]  # long, and read into step.exchanges
        for stage, fields in zip(self.stages, tree["stages"], strict=True):
            fields["step"] |= {"seconds": stage.step.seconds, "untold": stage.step.untold}
            for name, is_tensor in (("tensor", True), ("data", False)):
                seconds, hidden = stage.step.traffic(is_tensor)
                fields["step"][name] = {"exposed": seconds - hidden, "hidden": hidden}
            for exchange, words in zip(stage.step.exchanges, fields["step"]["exchanges"], strict=True):
                words["exposed"] = exchange.exposed
            fields["executed_flops"] = stage.executed_flops
            fields["tflops"] = self.tflops(stage)
        return {**tree, "refusals": list(self.refusals)}
