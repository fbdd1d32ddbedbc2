"""Planning of a run: its steps, evaluations, growths and certificates are compiled for the machine, then priced."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from flmjax.config import CheckpointConfig, ConfigError, MeshShape, RunConfig, Stage
from flmjax.config.validate import validate_meshes
from flmjax.hardware import GiB, compiler_options
from flmjax.model.flops import flops_per_token, num_parameters
from flmjax.planning import cost
from flmjax.planning.calendar import (
    SECONDS_A_DAY,
    Operation,
    Phase,
    best_interval,
    calendar,
    default_hours_between_failures,
)
from flmjax.planning.compile import Compiler, bytes_of_device
from flmjax.planning.cost import Machine, Published
from flmjax.planning.plan import Evaluations, GrowthPlan, Plan, ReplicaSums, Saves, StagePlan, SumCost
from flmjax.planning.program import Program
from flmjax.planning.roofline import (
    StepTime,
    certificate_time,
    fused_attention_flops,
    growth_time,
    link_seconds,
    peak_rate,
    replica_sum,
    step_time,
)
from flmjax.planning.topology import XLA_PLATFORMS, parse_topology

TILE_ROWS = {"bfloat16": 16, "float32": 8}  # of a TPU's tile; shards of incomplete tiles cannot be scattered

NARROW = 1024  # embed_dim below which the times of a plan are far too short
MOST_FAILURES = 3  # expected failures from one save to the next in a plan: one attempt in 20 succeeds

Log = Callable[[str], None]


def make_plan(
    config: RunConfig, price: float | None, log: Log = lambda _: None, hours_between_failures: float | None = None
) -> Plan:
    """Compile every step, evaluation, growth and certificate of a run for its mesh.topology.

    Args:
        price: dollars for a device-hour; None: the paper's for A800s, otherwise unknown.
        log: called with a line before and after each compilation.
        hours_between_failures: mean time between failures of the machine; None: that of published large runs.

    Raises:
        ConfigError: for a machine, a mesh or a size that does not fit, and without cuDNN where the config needs it.
        TooLargeError: from a compiler that makes no program that does not fit (the TPU's); names it and its remedy.
    """
    costs = cost.stage_costs(config)
    topology = parse_topology(config.mesh.topology)
    meshes = validate_meshes(config, topology.num_devices)
    peak_rate(topology.chip, config.model)  # refuses a dtype before anything is compiled
    compiler = Compiler(config, topology)
    machine = cost.machine_of(topology.chip, topology.num_devices, price)
    operation = Operation(hours_between_failures or default_hours_between_failures(topology.num_devices))
    stages, growths = [], []
    for stage, published in zip(config.schedule, cost.published(costs), strict=True):
        if stage.previous is not None:
            growths.append(growth_plan(compiler, stage, log))
        log(f"step of {stage.name}")
        step = compile_step(compiler, stage, machine)
        log(f"  {_size(step.program)}")
        log(f"evaluation of {stage.name}")
        stages.append(stage_plan(compiler, stage, machine, step, operation, published))
        check_failures(stage.name, stages[-1].saves, operation)
        log(f"  {_size(stages[-1].evaluations.program)}")
    last = stages[-1]
    days = calendar(list(_phases(stages, growths)), _seconds(stages), operation)
    scratch = cost.cost_from_scratch(config)
    days_from_scratch = last.bill.days * scratch / last.cost.flops
    return Plan(
        topology=topology.name,
        platform=topology.platform,
        chip=topology.chip,
        devices=topology.num_devices,
        is_exact=compiler.is_exact,
        usable=topology.usable,
        stages=tuple(stages),
        growths=tuple(growths),
        total=cost.bill(machine, days.pure),
        calendar=days,
        expected=cost.bill(machine, days.expected),
        operation=operation,
        saved=cost.saved_at_equal_tokens([stage.cost.flops for stage in stages], scratch),
        saved_days=cost.saved_at_equal_tokens([stage.bill.days for stage in stages], days_from_scratch),
        remarks=(*remarks(config, meshes, topology.platform), *compiler.assumptions),
        compiler_options=tuple(
            compiler_options(XLA_PLATFORMS[topology.platform], config.overlap_collectives, config.deterministic)
        ),
    )


class StepPlan(NamedTuple):
    """The training step of a stage; FLOPs are those of one device, but model_flops those of all devices."""

    program: Program
    attention: str
    attention_flops: float
    model_flops: float
    time: StepTime


def compile_step(compiler: Compiler, stage: Stage, machine: Machine) -> StepPlan:
    """Compile the training step of a stage, and estimate its time; raises as make_plan."""
    program, attention = compiler.step(stage), compiler.attention(stage)
    model = stage.model
    tokens = stage.config.batch_size * model.max_length
    kernels = program.attention_products
    attention_flops = fused_attention_flops(model, tokens / machine.devices / stage.layout.microbatches, kernels)
    time = step_time(
        model,
        compiler.topology.chip,
        compiler.mesh_shape(stage),
        tokens=tokens / machine.devices,
        matmul_flops=program.matmul_flops,
        attention_flops=attention_flops,
        attention_products=kernels,
        state_bytes=program.aliased,
        timelines=program.timelines,
    )
    model_flops = tokens * flops_per_token(model, model.max_length)
    if compiler.is_exact:
        check_flops(
            program.name,
            executed=program.matmul_flops + attention_flops,
            needed=model_flops / machine.devices,
            rate=peak_rate(compiler.topology.chip, model),
            seconds=time.seconds,
        )
    return StepPlan(program, attention, attention_flops, model_flops, time)


def stage_plan(
    compiler: Compiler,
    stage: Stage,
    machine: Machine,
    step: StepPlan,
    operation: Operation,
    published: Published | None = None,
) -> StagePlan:
    """Compile the evaluation of a stage, and price the stage; raises as make_plan."""
    stage_cost = cost.stage_cost(stage)
    return StagePlan(
        cost=stage_cost,
        batch_size=stage.config.batch_size,
        mesh=compiler.mesh_shape(stage),
        remat=stage.layout.remat,
        microbatches=stage.layout.microbatches,
        attention=step.attention,
        program=step.program,
        attention_flops=step.attention_flops,
        model_flops=step.model_flops,
        step=step.time,
        bill=cost.bill(machine, stage_cost.steps * step.time.seconds / SECONDS_A_DAY),
        evaluations=evaluations(compiler, stage, machine),
        saves=saves(compiler, stage, step, operation),
        published=published,
        replica_sums=replica_sums(compiler, stage),
    )


def replica_sums(compiler: Compiler, stage: Stage) -> ReplicaSums | None:
    """Costs of summing a stage's gradients over the replicas once a step, and in every microbatch."""
    mesh, layout, topology = compiler.mesh_shape(stage), stage.layout, compiler.topology
    if mesh.replica == 1:
        return None
    one = replica_sum(bytes_of_device(compiler.spec(stage).abstract.params), mesh, topology.node_size)
    sums = {n: SumCost(n * one.bytes, n * link_seconds(topology.chip, one)) for n in (1, layout.microbatches)}
    return ReplicaSums(layout.gradient_reduction, step=sums[1], microbatch=sums[layout.microbatches])


def evaluations(compiler: Compiler, stage: Stage, machine: Machine) -> Evaluations:
    """Compile the evaluation of a stage, and estimate its time; raises as make_plan."""
    config, program, model = compiler.config, compiler.evaluation(stage), stage.model
    rows = stage.config.batch_size // stage.layout.microbatches
    tokens = rows * model.max_length / machine.devices
    kernels = program.attention_products
    time = step_time(
        model,
        compiler.topology.chip,
        compiler.mesh_shape(stage),
        tokens=tokens,
        matmul_flops=program.matmul_flops,
        attention_flops=fused_attention_flops(model, tokens, kernels),
        attention_products=kernels,
        state_bytes=0.0,
        timelines=program.timelines,
        passes=1,
    )
    every = config.evaluate_every
    number = stage.end // every - stage.start // every + (stage.end % every > 0)
    sequences = config.evaluation_rows * (2 if compiler.batch_kind.teachers else 1)  # as many of teachers as of text
    return Evaluations(program, -(-sequences // rows) * time.seconds, number)


def saves(compiler: Compiler, stage: Stage, step: StepPlan, operation: Operation) -> Saves:
    """The checkpoints of a stage: parameters and both moments in float32; its end is always saved."""
    config, devices = compiler.config, compiler.topology.num_devices
    size = 12.0 * num_parameters(stage.model)
    pause, written = size / devices / operation.host_link, size / operation.storage
    intervals = [steps * step.time.seconds for steps in (config.checkpoint.every, stage.end - stage.start)]
    intervals.append(60 * (config.checkpoint.every_minutes or math.inf))
    kept, stay = kept_saves(config.checkpoint, stage)
    return Saves(
        bytes=size,
        kept=kept,
        stay=stay,
        pause=pause,
        written=written,
        interval=min(intervals),
        best=max(best_interval(pause, operation.seconds_between_failures), written),
        restart=operation.restart + written + step.program.compile_seconds,
    )


def kept_saves(settings: CheckpointConfig, stage: Stage) -> tuple[int, int]:
    """Number of a stage's checkpoints on disk at its end, and of those among them that are kept for ever.

    Saves that checkpoint.every_minutes adds are counted as those of checkpoint.every.
    """
    every, kept_every = settings.every, settings.keep_every

    def stays(step: int) -> bool:
        return (step == stage.end and settings.keep_stage_ends) or (kept_every is not None and step % kept_every == 0)

    before_end = range((stage.end - 1) // every * every, stage.start, -every)  # the end is always saved
    newest = [stage.end, *before_end[: settings.keep - 1]]
    stay = int(stays(stage.end))
    if kept_every is not None:
        stay += (stage.end - 1) // kept_every - stage.start // kept_every
    return stay + sum(not stays(step) for step in newest), stay


def _seconds(stages: Sequence[StagePlan]) -> float:
    """Seconds of all steps."""
    return sum(stage.bill.days for stage in stages) * SECONDS_A_DAY


def _phases(stages: Sequence[StagePlan], growths: Sequence[GrowthPlan]) -> Iterator[Phase]:
    """The work of every stage, evaluations and the growth into it included, with its saves and restarts."""
    for stage, growth in zip(stages, (None, *growths), strict=True):
        work = stage.cost.steps * stage.step.seconds + stage.evaluations.number * stage.evaluations.seconds
        work += sum(program.compile_seconds for program in (stage.program, stage.evaluations.program))
        if growth is not None:
            work += growth.seconds + growth.certificate_seconds
            work += sum(program.compile_seconds for program in growth.programs)
        yield Phase(work, min(stage.saves.interval, work), stage.saves.pause, stage.saves.restart)


def check_failures(name: str, saves: Saves, operation: Operation) -> None:
    """Refuse a run that fails so often that it hardly reaches the next save.

    Raises:
        ConfigError: naming the stage and the longest interval between saves that would do.
    """
    between = operation.seconds_between_failures
    if saves.interval + saves.pause + saves.restart <= MOST_FAILURES * between:
        return
    longest = MOST_FAILURES * between - saves.pause - saves.restart
    cure = f"checkpoint.every_minutes={longest / 60:.1f} would do" if longest > 60 else "no interval is short enough"
    raise ConfigError(
        f"stage {name} would hardly end: a failure every {between / 60:.3g} minutes, {saves.interval / 60:.0f} minutes "
        f"from one save to the next, {saves.restart / 60:.0f} to restart; {cure} (--hours-between-failures)"
    )


def check_flops(name: str, *, executed: float, needed: float, rate: float, seconds: float) -> None:
    """Refuse a step whose FLOPs were miscounted: fewer than the model's, or more in a second than the chip's peak.

    Args:
        executed, needed: FLOPs of one device in the program, and of the model without recomputation.
        rate: peak FLOP/s of the chip.

    Raises:
        ConfigError: naming the step.
    """
    if executed < 0.98 * needed:
        raise ConfigError(
            f"{name}: {executed:.4g} FLOPs were counted in its program, but its model needs {needed:.4g} a device; the "
            "program was not read correctly, and its time is not known"
        )
    if (most := max(executed, needed) / seconds) > rate:
        raise ConfigError(f"{name}: {most:.4g} FLOP/s a device exceed the chip's peak of {rate:.4g}; its time is wrong")


def growth_plan(compiler: Compiler, stage: Stage, log: Log) -> GrowthPlan:
    """Compile the growth into a stage and its certificate; raises as make_plan."""
    assert stage.previous is not None
    log(f"growth {stage.previous.name} -> {stage.name}")
    program, chip = compiler.growth(stage), compiler.topology.chip
    log(f"  {_size(program)}")
    log("certificate of that growth")
    certificate = compiler.certificate(stage)
    log(f"  {_size(certificate)}")
    return GrowthPlan(
        from_stage=stage.previous.name,
        to_stage=stage.name,
        program=program,
        seconds=growth_time(chip, program),
        certificate=certificate,
        certificate_seconds=certificate_time(chip, certificate, stage.model),
    )


def remarks(config: RunConfig, meshes: Sequence[MeshShape], platform: str) -> Iterator[str]:
    """Lines on what the sizes of the programs do not show: slow shards, and work that is not in the plan."""
    for stage, mesh in zip(config.schedule, meshes, strict=True):
        width, tile = stage.model.embed_dim, TILE_ROWS.get(stage.model.dtype)
        rows = width // mesh.fsdp
        if platform == "tpu" and tile is not None and rows % tile and width % tile == 0:
            fsdp = max(n for n in range(1, mesh.fsdp) if mesh.fsdp % n == 0 == width // n % tile)
            yield (
                f"{stage.name}: over fsdp={mesh.fsdp} a shard has {rows} of {width} rows of a matrix, not a multiple "
                f"of {tile}: a TPU then reduces some gradients completely where it could scatter them; "
                f"replica={mesh.replica * mesh.fsdp // fsdp}, fsdp={fsdp} avoids it"
            )
    narrow = [stage.name for stage in config.schedule if stage.model.embed_dim < NARROW]
    if narrow:
        yield (
            f"{', '.join(narrow)}: narrower than {NARROW}, which products do not reach the assumed share of the peak "
            "with: FLM-101B's proxy, 256 wide, took 4 times the time that this plan would give"
        )
    if lines := cost.tuning_words(cost.stage_costs(config)):
        yield f"{', '.join(lines)}; each is counted as a step, and their program is not compiled"


def _size(program: Program) -> str:
    return f"peak {program.peak / GiB:.1f} GiB a device, compiled in {program.compile_seconds:.0f} s"
