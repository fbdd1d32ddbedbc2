"""Planning of a run: every training step and every growth is compiled for the machine, then priced."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from flmjax.config import ConfigError, MeshShape, RunConfig, Stage
from flmjax.config.validate import validate_meshes
from flmjax.hardware import GiB, compiler_options
from flmjax.model.flops import flops_per_token
from flmjax.planning import cost
from flmjax.planning.compile import Compiler
from flmjax.planning.cost import Machine, Published
from flmjax.planning.plan import GrowthPlan, Plan, StagePlan
from flmjax.planning.program import Program
from flmjax.planning.roofline import fused_attention_flops, growth_time, peak_rate, step_time
from flmjax.planning.topology import XLA_PLATFORMS, parse_topology

TILE_ROWS = {"bfloat16": 16, "float32": 8}  # of a TPU's tile; shards of incomplete tiles cannot be scattered

Log = Callable[[str], None]


def make_plan(config: RunConfig, price: float | None, log: Log = lambda _: None) -> Plan:
    """Compile every step and every growth of a run for its mesh.topology.

    Args:
        price: dollars for a device-hour; None: the paper's for A800s, otherwise unknown.
        log: called with a line before and after each compilation.

    Raises:
        ConfigError: for a machine, a mesh or a size that does not fit, and without cuDNN where the config needs it.
        TooLargeError: from a compiler that makes no program that does not fit (the TPU's); names it and its remedy.
    """
    costs = cost.stage_costs(config)
    topology = parse_topology(config.mesh.topology)
    meshes = validate_meshes(config, topology.num_devices)
    compiler = Compiler(config, topology)
    machine = cost.machine_of(topology.chip, topology.num_devices, price)
    stages, growths = [], []
    for stage, published in zip(config.schedule, cost.published(costs), strict=True):
        if stage.previous is not None:
            growths.append(growth_plan(compiler, stage, is_last=stage is config.schedule[-1], log=log))
        log(f"step of {stage.name}")
        stages.append(stage_plan(compiler, stage, machine, published))
        log(f"  {_size(stages[-1].program)}")
    last = stages[-1]
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
        total=cost.bill(machine, sum(stage.bill.days for stage in stages)),
        saved=cost.saved_at_equal_tokens([stage.cost.flops for stage in stages], scratch),
        saved_days=cost.saved_at_equal_tokens([stage.bill.days for stage in stages], days_from_scratch),
        remarks=(*remarks(config, meshes, topology.platform), *compiler.assumptions),
        compiler_options=tuple(compiler_options(XLA_PLATFORMS[topology.platform], config.overlap_collectives)),
    )


def stage_plan(compiler: Compiler, stage: Stage, machine: Machine, published: Published | None = None) -> StagePlan:
    """Compile the training step of a stage, and price the stage; raises as make_plan."""
    program, attention = compiler.step(stage), compiler.attention(stage)
    settings, model = stage.config, stage.model
    tokens = settings.batch_size * model.max_length
    kernels = program.attention_products
    attention_flops = fused_attention_flops(model, tokens / machine.devices / stage.layout.microbatches, kernels)
    step = step_time(
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
    stage_cost = cost.stage_cost(stage)
    model_flops = tokens * flops_per_token(model, model.max_length)
    if compiler.is_exact:
        check_flops(
            program.name,
            executed=program.matmul_flops + attention_flops,
            needed=model_flops / machine.devices,
            rate=peak_rate(compiler.topology.chip, model),
            seconds=step.seconds,
        )
    return StagePlan(
        cost=stage_cost,
        batch_size=settings.batch_size,
        mesh=compiler.mesh_shape(stage),
        remat=stage.layout.remat,
        microbatches=stage.layout.microbatches,
        attention=attention,
        program=program,
        attention_flops=attention_flops,
        model_flops=model_flops,
        step=step,
        bill=cost.bill(machine, stage_cost.steps * step.seconds / 86_400),
        published=published,
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


def growth_plan(compiler: Compiler, stage: Stage, is_last: bool, log: Log) -> GrowthPlan:
    """Compile the growth into a stage and, of the last growth, the certificate; raises as make_plan."""
    assert stage.previous is not None
    log(f"growth {stage.previous.name} -> {stage.name}")
    program = compiler.growth(stage)
    growth = GrowthPlan(stage.previous.name, stage.name, program, growth_time(compiler.topology.chip, program))
    log(f"  {_size(growth.program)}")
    if not is_last:
        return growth
    log("certificate of that growth")
    certificate = compiler.certificate(stage)
    log(f"  {_size(certificate)}")
    return dataclasses.replace(growth, certificate=certificate)


def remarks(config: RunConfig, meshes: Sequence[MeshShape], platform: str) -> Iterator[str]:
    """Lines on what the sizes of the programs do not show: slow shards, and work that is not in the plan."""
    for stage, mesh in zip(config.schedule, meshes, strict=True):
        width, tile = stage.model.embed_dim, TILE_ROWS[stage.model.dtype]
        rows = width // mesh.fsdp
        if platform == "tpu" and rows % tile and width % tile == 0:
            fsdp = max(n for n in range(1, mesh.fsdp) if mesh.fsdp % n == 0 == width // n % tile)
            yield (
                f"{stage.name}: over fsdp={mesh.fsdp} a shard has {rows} of {width} rows of a matrix, not a multiple "
                f"of {tile}: a TPU then reduces some gradients completely where it could scatter them; "
                f"replica={mesh.replica * mesh.fsdp // fsdp}, fsdp={fsdp} avoids it"
            )
    if lines := cost.tuning_words(cost.stage_costs(config)):
        yield f"{', '.join(lines)}; each is counted as a step, and their program is not compiled"
    yield "days are without pauses, evaluations and saves; the program of an evaluation is not compiled"


def _size(program: Program) -> str:
    return f"peak {program.peak / GiB:.1f} GiB a device, compiled in {program.compile_seconds:.0f} s"
