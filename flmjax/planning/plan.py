"""A run, priced before anybody books a machine: what every stage and every growth takes there.

This file needs no JAX; what compiles is imported where it is called.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flmjax.config import ConfigError, MeshConfig, RunConfig
from flmjax.config.validate import legal_microbatches
from flmjax.hardware import Chip, GiB
from flmjax.model.flops import flops_per_token
from flmjax.planning import cost
from flmjax.planning.cost import Bill, Published, StageCost
from flmjax.planning.roofline import StepTime, fused_attention_flops, step_time
from flmjax.planning.topology import USABLE, TooLargeError
from flmjax.stderr import captured_stderr

if TYPE_CHECKING:
    from flmjax.planning.compile import Compiler, Program
    from flmjax.planning.topology import Topology

# Rows of a TPU's tile: it moves shards of whole tiles as they are, and no others.
TILE_ROWS = {"bfloat16": 16, "float32": 8}
MORE_DEVICES = "take more devices along fsdp or tensor"


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage on the machine; FLOPs, bytes and times are of a step, those of `program` of one device.

    Attributes:
        cost: of the whole stage. attention: the backend. attention_flops: of its kernels, which no program shows.
        model_flops: of all devices, by FLOPS_CONVENTION. bill: of the whole stage at the estimated step time.
    """

    cost: StageCost
    batch_size: int
    microbatches: int
    attention: str
    program: "Program"
    attention_flops: float
    model_flops: float
    step: StepTime
    bill: Bill
    published: Published | None

    @property
    def executed_flops(self) -> float:
        """Of one device, recomputed layers included."""
        return self.program.matmul_flops + self.attention_flops


@dataclasses.dataclass(frozen=True)
class GrowthPlan:
    """The growth from one stage to the next; old and new state are in memory at once.

    Attributes:
        certificate: the comparison of both models after it; None but for the last growth, whose models are the largest.
    """

    from_stage: str
    to_stage: str
    program: "Program"
    certificate: "Program | None" = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run on a machine.

    Attributes:
        is_exact: False where fake CPU devices stood in for the machine: only whether programs partition is known.
        usable: bytes of a device that a program can have.
        saved: share of FLOPs that the schedule saves at equal tokens. saved_days: of days at equal tokens and speed.
        remarks: what runs but could be better, or is not in the plan. refusals: what does not fit.
    """

    topology: str
    platform: str
    chip: Chip
    devices: int
    mesh: MeshConfig
    is_exact: bool
    usable: float
    stages: tuple[StagePlan, ...]
    growths: tuple[GrowthPlan, ...]
    total: Bill
    saved: float
    saved_days: float
    remarks: tuple[str, ...]
    refusals: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain nested dictionary, what is derived included."""
        tree = dataclasses.asdict(self)
        for stage, own in zip(self.stages, tree["stages"], strict=True):
            own["step"]["seconds"] = stage.step.seconds
            own["executed_flops"] = stage.executed_flops
            own["tflops"] = tflops(stage, self.devices)
        return tree


def make_plan(config: RunConfig, price: float | None, log: Callable[[str], None] = lambda _: None) -> Plan:
    """Compile every step and every growth of a run for its mesh.topology.

    Args:
        price: dollars for a device-hour; None: the paper's for A800s, else unknown.
        log: told of each program.

    Raises:
        ConfigError: for a machine, a mesh or a size that does not fit, and without cuDNN where the config asks for it.
        TooLargeError: from a compiler that makes no program of what does not fit (TPU's): names it and what to change.
    """
    costs = cost.stage_costs(config)
    compiler_of, topology = compiler_for(config)
    compiler = compiler_of(config)
    machine = machine_of(topology.chip, topology.num_devices, price)
    stages, growths = [], []
    for index, (own, published) in enumerate(zip(costs, cost.published(costs), strict=True)):
        if index:
            growths.append(growth_plan(compiler, index, log))
        log(f"step of {own.name}")
        stages.append(stage_plan(compiler, index, own, machine, published))
        log(_size(stages[-1].program))
    usable = USABLE[topology.platform] * topology.chip.memory
    last = stages[-1]
    scratch = cost.cost_from_scratch(config)
    days_from_scratch = last.bill.days * scratch / last.cost.flops
    plan = Plan(
        topology=topology.name,
        platform=topology.platform,
        chip=topology.chip,
        devices=topology.num_devices,
        mesh=compiler.mesh_config,
        is_exact=compiler.is_exact,
        usable=usable,
        stages=tuple(stages),
        growths=tuple(growths),
        total=cost.bill(machine, sum(stage.bill.days for stage in stages)),
        saved=cost.saved_at_equal_tokens([own.flops for own in costs], scratch),
        saved_days=cost.saved_at_equal_tokens([stage.bill.days for stage in stages], days_from_scratch),
        remarks=tuple(_remarks(config, compiler.mesh_config, topology.platform)),
        refusals=(),
    )
    return dataclasses.replace(plan, refusals=tuple(_refusals(plan, config)))


def compiler_for(config: RunConfig) -> "tuple[Callable[[RunConfig], Compiler], Topology]":
    """What compiles a run for its mesh.topology, and that topology.

    Raises:
        ConfigError: for a topology that is None or no machine.
    """
    if config.mesh.topology is None:
        raise ConfigError("mesh.topology is None; name the machine: --config.mesh.topology=a800:24x8")
    with captured_stderr():  # the CUDA plugin says that no GPU is here
        from flmjax.planning.compile import Compiler
        from flmjax.planning.topology import parse_topology
    topology = parse_topology(config.mesh.topology)
    return lambda chosen: Compiler(chosen, topology), topology


def machine_of(chip: Chip, devices: int, price: float | None) -> cost.Machine:
    """`devices` of a kind; a price of None is the paper's for A800s."""
    if price is None and chip.kind == "A800":
        price = cost.DOLLARS_PER_HOUR
    return cost.Machine(devices, price, chip.watts)


def stage_plan(
    compiler: Any, index: int, own: StageCost, machine: cost.Machine, published: Published | None
) -> StagePlan:
    """One stage, its step compiled.

    Raises:
        TooLargeError: as make_plan.
    """
    stage, model = compiler.config.stages[index], compiler.config.stage_models[index]
    with _named(step_of(compiler.config, index, compiler.mesh_config)):
        program, attention = compiler.step(index), compiler.attention(index)
    tokens = stage.batch_size * model.max_length
    fused = 0.0 if attention == "plain" else fused_attention_flops(model, tokens / machine.devices)
    step = step_time(
        model,
        compiler.topology.chip,
        compiler.mesh_config,
        tokens=tokens / machine.devices,
        matmul_flops=program.matmul_flops,
        attention_flops=fused,
        state_bytes=program.aliased,
        collectives=program.collectives,
    )
    return StagePlan(
        cost=own,
        batch_size=stage.batch_size,
        microbatches=stage.microbatches,
        attention=attention,
        program=program,
        attention_flops=fused,
        model_flops=tokens * flops_per_token(model, model.max_length),
        step=step,
        bill=cost.bill(machine, own.steps * step.seconds / 86_400),
        published=published,
    )


def growth_plan(compiler: Any, index: int, log: Callable[[str], None]) -> GrowthPlan:
    """The growth into a stage, compiled; of the last one the certificate, too.

    Raises:
        TooLargeError: as make_plan.
    """
    config: RunConfig = compiler.config
    subject = growth_of(config, index)
    log(subject[0])
    with _named(subject):
        growth = GrowthPlan(config.stages[index - 1].name, config.stages[index].name, compiler.growth(index))
    log(_size(growth.program))
    if index < len(config.stages) - 1:
        return growth
    log("certificate of that growth")
    with _named(certificate_of(config, index, compiler.mesh_config)):
        proof = compiler.certificate(index)
    log(_size(proof))
    return dataclasses.replace(growth, certificate=proof)


def tflops(stage: StagePlan, devices: int) -> float:
    """Model TFLOP/s of one device as the paper counts them: attention in full, nothing twice."""
    return stage.cost.flops / stage.cost.steps / stage.step.seconds / devices / 1e12


def tuning_words(costs: Sequence[StageCost]) -> list[str]:
    """What is said of updates that tune a growth."""
    return [
        f"{own.name}: of {own.steps:,} updates {own.tuning_steps:,} tune its growth"
        for own in costs
        if own.tuning_steps
    ]


def _remarks(config: RunConfig, mesh: MeshConfig, platform: str) -> Iterator[str]:
    """What the programs' sizes do not show."""
    assert mesh.fsdp is not None
    for stage, model in zip(config.stages, config.stage_models, strict=True):
        rows, tile = model.embed_dim // mesh.fsdp, TILE_ROWS[model.dtype]
        if platform == "tpu" and rows % tile and model.embed_dim % tile == 0:
            whole = max(n for n in range(1, mesh.fsdp) if mesh.fsdp % n == 0 == model.embed_dim // n % tile)
            yield (
                f"{stage.name}: over fsdp={mesh.fsdp} a shard has {rows} of {model.embed_dim} rows, no multiple of "
                f"{tile}: a TPU reduces some gradients whole where it could scatter them; "
                f"replica={mesh.replica * mesh.fsdp // whole}, fsdp={whole} avoids it"
            )
    if tuned := tuning_words(cost.stage_costs(config)):
        yield f"{', '.join(tuned)}; each is counted as a step, and their program is not compiled"
    yield "days are without pauses, evaluations and saves; the program of an evaluation is not compiled"


# ---- what does not fit: the name of a program, and what to change ----------------------------------------------------

Subject = tuple[str, str]


def step_of(config: RunConfig, index: int, mesh: MeshConfig) -> Subject:
    """A stage's step; a cheap change first."""
    stage = config.stages[index]
    assert mesh.fsdp is not None
    more = [n for n in legal_microbatches(stage, mesh.replica * mesh.fsdp) if n > stage.microbatches]
    advice = f"take stages[{index}].microbatches={more[0]}" if more else MORE_DEVICES
    return f"stages[{index}] ({stage.name})", advice if config.model.remat == "full" else "take model.remat='full'"


def growth_of(config: RunConfig, index: int) -> Subject:
    """The growth into a stage."""
    old, new = (stage.name for stage in config.stages[index - 1 : index + 1])
    return f"growth {old} -> {new}", MORE_DEVICES


def certificate_of(config: RunConfig, index: int, mesh: MeshConfig) -> Subject:
    """The proof of the growth into a stage."""
    assert mesh.fsdp is not None
    fewest = mesh.replica * mesh.fsdp
    advice = f"take certificate_rows={fewest}" if config.certificate_rows > fewest else MORE_DEVICES
    return f"the certificate of {growth_of(config, index)[0]}", advice


def refusals(subject: Subject, program: "Program", chip: Chip, usable: float) -> list[str]:
    """One line if the program does not fit, else none."""
    if program.peak <= usable:
        return []
    name, advice = subject
    return [
        f"{name} needs {program.peak / GiB:.1f} GiB a device, a {chip.kind} has {chip.memory / GiB:.0f} "
        f"({usable / GiB:.1f} for programs): {advice}"
    ]


def growth_refusals(
    config: RunConfig, index: int, mesh: MeshConfig, growth: GrowthPlan, chip: Chip, usable: float
) -> list[str]:
    """Those of the growth into a stage, and of its certificate."""
    found = refusals(growth_of(config, index), growth.program, chip, usable)
    if growth.certificate is not None:
        found += refusals(certificate_of(config, index, mesh), growth.certificate, chip, usable)
    return found


def _refusals(plan: Plan, config: RunConfig) -> Iterator[str]:
    """Those of a whole plan; of a stand-in's memory nothing is said."""
    if not plan.is_exact:
        return
    for index, stage in enumerate(plan.stages):
        yield from refusals(step_of(config, index, plan.mesh), stage.program, plan.chip, plan.usable)
    for index, growth in enumerate(plan.growths, start=1):
        yield from growth_refusals(config, index, plan.mesh, growth, plan.chip, plan.usable)


@contextlib.contextmanager
def _named(subject: Subject) -> Iterator[None]:
    """Whose program a compiler refuses, and what to change."""
    try:
        yield
    except TooLargeError as error:
        name, advice = subject
        raise TooLargeError(f"{name} {error}: {advice}") from error


def _size(program: "Program") -> str:
    return f"  {program.peak / GiB:.1f} GiB at most, in {program.compile_seconds:.0f} s"
