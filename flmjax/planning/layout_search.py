"""Search for the layout of every stage (mesh, rematerialisation, microbatches) that trains a run fastest on a machine.

Every legal layout of a stage is estimated by formulas; the best are compiled, with more microbatches until they fit.
Of the layouts that fit, the fastest of every stage are joined whose growths and certificates fit too. Attention is
"fused" in all of them: where documents are kept apart it is the fastest backend that can do so.
"""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flmjax.config import MESH_AXES, ConfigError, MeshShape, ModelConfig, Remat, RunConfig, Stage, with_layout
from flmjax.config.validate import check_stage, legal_microbatches
from flmjax.hardware import GiB
from flmjax.model.flops import block_matrices, num_parameters
from flmjax.planning import cost
from flmjax.planning.compile import Compiler
from flmjax.planning.exchanges import Collective, Timeline, Transfer
from flmjax.planning.planner import compile_step, growth_plan
from flmjax.planning.program import Program
from flmjax.planning.roofline import fused_attention_flops, replica_sum, step_time
from flmjax.planning.topology import PACKAGES, TooLargeError, Topology, parse_topology
from flmjax.text_table import duration, text_table

TENSOR = (1, 2, 4, 8)  # sizes of tensor groups: those that lie inside one node of 8
LARGEST_FSDP = 64  # larger axes have smaller shards and longer rings, which the estimates do not price
SLACK = 1.1  # estimates of memory are a tenth off at most: a layout that is a tenth too large may fit once compiled

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class StageLayout:
    """A layout of one stage.

    Attributes:
        seconds: of a step, estimated by formulas or from the compiled program.
        peak: most bytes of a device in the step; None: not compiled.
    """

    mesh: MeshShape
    remat: Remat
    microbatches: int
    seconds: float
    peak: int | None = None

    def __str__(self) -> str:
        mesh = self.mesh
        words = f"replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, remat {self.remat}"
        return f"{words}, {self.microbatches} microbatches"


def with_layouts(config: RunConfig, layouts: Mapping[int, StageLayout]) -> RunConfig:
    """The run with other layouts of some stages.

    Args:
        layouts: by the number of the stage.
    """
    stages = list(config.stages)
    for index, layout in layouts.items():
        stage = with_layout(stages[index], layout.mesh, layout.remat, layout.microbatches)
        stages[index] = dataclasses.replace(stage, attention="fused")
    return dataclasses.replace(config, stages=tuple(stages))


@dataclasses.dataclass(frozen=True)
class LayoutSearch:
    """Result of a search.

    Attributes:
        stages: for each stage the layouts whose compiled steps fit, the fastest first.
        best: one layout of each stage, the fastest whose growths fit.
        days: of the run with the layouts of `best`, growths included.
        peak: most bytes of a device in any program of that run.
        possible: number of layouts of a stage that may fit by estimate, of all stages.
        tried: number of these that were compiled.
    """

    stages: tuple[tuple[StageLayout, ...], ...]
    best: tuple[StageLayout, ...]
    days: float
    peak: int
    possible: int
    tried: int


def search_layouts(config: RunConfig, log: Log = lambda _: None, tries: int = 3) -> LayoutSearch:
    """Compile layouts for mesh.topology, the best by estimate first, until `tries` of every stage fit.

    Raises:
        ConfigError: when no layout of a stage is legal or none fits, and without the machine's compiler, which alone
            can tell.
    """
    topology = parse_topology(config.mesh.topology)
    steps = [stage.steps for stage in cost.stage_costs(config)]
    candidates = [estimates(stage, topology) for stage in config.schedule]
    compiler = Compiler(config, topology)
    if not compiler.is_exact:
        raise ConfigError(
            f"the compiler of {topology.name} is missing, and without it no program is known to fit; "
            f"pip install '{PACKAGES[topology.platform]}'"
        )
    fitting, tried = [], 0
    for stage, layouts in zip(config.schedule, candidates, strict=True):
        fitting.append(fitting_layouts(stage, layouts, compiler, log, tries))
        tried += fitting[-1].tried
    search = _Growths(compiler, log)

    def seconds(run: Sequence[StageLayout]) -> float:
        return sum(n * layout.seconds for n, layout in zip(steps, run, strict=True))

    for run in sorted(itertools.product(*(layouts.fitting for layouts in fitting)), key=seconds):
        try:
            growth_seconds, peak = search.between(run)
        except TooLargeError as error:
            reason = str(error)
            log(f"  {reason}")
            continue
        return LayoutSearch(
            stages=tuple(layouts.fitting for layouts in fitting),
            best=run,
            days=(seconds(run) + growth_seconds) / 86_400,
            peak=max(peak, *(layout.peak or 0 for layout in run)),
            possible=sum(map(len, candidates)),
            tried=tried,
        )
    raise ConfigError(f"layouts whose steps fit {topology.name} have growths that do not; of the last ones, {reason}")


class Fitting(NamedTuple):
    """Layouts of a stage that fit once compiled, the fastest first, and the number of layouts that were compiled."""

    fitting: tuple[StageLayout, ...]
    tried: int


def fitting_layouts(stage: Stage, layouts: Sequence[StageLayout], compiler: Compiler, log: Log, tries: int) -> Fitting:
    """The first `tries` layouts that fit with all microbatches that they need.

    Raises:
        ConfigError: if no layout fits.
    """
    fitting: list[StageLayout] = []
    tried, reason = 0, ""
    for layout in layouts:
        tried += 1
        log(f"{stage.name}: {layout}, estimated {duration(layout.seconds)} a step")
        try:
            fitting.append(fit(stage, layout, compiler, log))
        except TooLargeError as error:
            reason = str(error)
            log(f"  {reason}")
        if len(fitting) == tries:
            break
    if not fitting:
        raise ConfigError(
            f"none of the {len(layouts)} layouts of stage {stage.name} that may fit {compiler.topology.name} does; of "
            f"the last one, {reason}"
        )
    return Fitting(tuple(sorted(fitting, key=lambda layout: layout.seconds)), tried)


def fit(stage: Stage, layout: StageLayout, compiler: Compiler, log: Log) -> StageLayout:
    """The layout with as many microbatches as the compiled step needs to fit, with its time and its peak.

    Raises:
        TooLargeError: if the step fits with no number of microbatches.
    """
    topology = compiler.topology
    machine = cost.machine_of(topology.chip, topology.num_devices, None)
    counts = legal_microbatches(stage.config, layout.mesh.data_shards)
    refusal = TooLargeError(f"{stage.name} has no {layout.microbatches} microbatches or more")
    for count in [n for n in counts if n >= layout.microbatches]:
        larger = dataclasses.replace(layout, microbatches=count)
        applied = with_layouts(compiler.config, {stage.index: larger}).schedule[stage.index]
        try:
            step = compile_step(compiler, applied, machine)
            log(f"  {count} microbatches: {step.program.peak / GiB:.1f} GiB, {duration(step.time.seconds)} a step")
            _require_fit(step.program, topology)
        except TooLargeError as error:
            refusal = error
            continue
        return dataclasses.replace(larger, seconds=step.time.seconds, peak=step.program.peak)
    raise refusal


class _Growths:
    """Growths and certificates, which depend on the meshes alone: each is compiled once for its two meshes."""

    def __init__(self, compiler: Compiler, log: Log):
        self._compiler, self._log = compiler, log
        self._known: dict[tuple[int, MeshShape, MeshShape], tuple[float, int] | TooLargeError] = {}

    def between(self, run: Sequence[StageLayout]) -> tuple[float, int]:
        """(Seconds of all growths, most bytes of a device) of a run with these layouts.

        Raises:
            TooLargeError: naming the growth or the certificate that does not fit.
        """
        schedule = with_layouts(self._compiler.config, dict(enumerate(run))).schedule
        seconds, peak = 0.0, 0
        for stage in schedule[1:]:
            key = (stage.index, run[stage.index - 1].mesh, run[stage.index].mesh)
            if key not in self._known:
                self._known[key] = self._compile(stage)
            known = self._known[key]
            if isinstance(known, TooLargeError):
                raise known
            seconds, peak = seconds + known[0], max(peak, known[1])
        return seconds, peak

    def _compile(self, stage: Stage) -> tuple[float, int] | TooLargeError:
        topology = self._compiler.topology
        try:
            growth = growth_plan(self._compiler, stage, self._log)
            for program in growth.programs:
                _require_fit(program, topology)
        except TooLargeError as error:
            return error
        return growth.seconds + growth.certificate_seconds, max(program.peak for program in growth.programs)


def _require_fit(program: Program, topology: Topology) -> None:
    if refusal := program.refusal(topology.chip, topology.usable):
        raise TooLargeError(refusal)


def flags(layouts: Sequence[StageLayout]) -> str:
    """A layout for each stage as flags of the command line."""
    words = []
    for i, layout in enumerate(layouts):
        settings = {f"mesh.{axis}": getattr(layout.mesh, axis) for axis in MESH_AXES}
        settings |= {"remat": layout.remat, "attention": "fused", "microbatches": layout.microbatches}
        words += [f"'--config.stages[{i}].{name}={value}'" for name, value in settings.items()]
    return " ".join(words)


def layout_table(search: LayoutSearch, names: Sequence[str]) -> str:
    """The layouts of every stage that fit as a table for a terminal, and the flags of the best.

    Args:
        names: of the stages.
    """
    rows = [("stage", "mesh", "remat", "microbatches", "step", "peak", "")]
    for name, layouts, best in zip(names, search.stages, search.best, strict=True):
        for layout in layouts:
            mesh = layout.mesh
            rows.append(
                (
                    name,
                    f"replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor}",
                    layout.remat,
                    str(layout.microbatches),
                    duration(layout.seconds),
                    f"{(layout.peak or 0) / GiB:.1f} GiB",
                    "taken" if layout == best else "",
                )
            )
    return "\n".join(
        [
            text_table(rows, left=3),
            f"compiled: {search.tried} of {search.possible} layouts that may fit, the best of every stage by estimate",
            f"the fastest whose growths fit too: {search.days:.1f} days, peak {search.peak / GiB:.1f} GiB a device",
            flags(search.best),
        ]
    )


# ---- estimates -------------------------------------------------------------------------------------------------------


def meshes(stage: Stage, devices: int) -> Iterator[MeshShape]:
    """Meshes of all `devices` over which the sizes and the batch of a stage divide."""
    single = dataclasses.replace(stage, layout=stage.layout._replace(microbatches=1))
    for tensor in TENSOR:
        for fsdp in [n for n in range(1, LARGEST_FSDP + 1) if devices % (tensor * n) == 0]:
            mesh = MeshShape(devices // (tensor * fsdp), fsdp, tensor)
            try:
                check_stage(single, mesh)
            except ConfigError:
                continue
            yield mesh


def estimates(stage: Stage, topology: Topology) -> list[StageLayout]:
    """Every legal layout of a stage with the fewest microbatches that may fit, the fastest by estimate first.

    Raises:
        ConfigError: when no mesh divides the sizes or no layout may fit, and without a vocabulary size.
    """
    layouts, batch_size = [], stage.config.batch_size
    for mesh in meshes(stage, topology.num_devices):
        if mesh.replica % topology.slices:
            continue
        for remat in typing.get_args(Remat):  # those that recompute less first
            model = dataclasses.replace(stage.model, remat=remat, attention="fused")
            for n in legal_microbatches(stage.config, mesh.data_shards):
                if memory(model, mesh, batch_size // n, n) < SLACK * topology.usable:
                    layouts.append(StageLayout(mesh, remat, n, seconds(model, batch_size, n, mesh, topology)))
                    break
    if not layouts:
        raise ConfigError(
            f"stages[{stage.index}] ({stage.name}): no mesh of {topology.num_devices} devices that its sizes and its "
            "batch divide over may fit it"
        )
    return sorted(layouts, key=lambda layout: layout.seconds)


def memory(model: ModelConfig, mesh: MeshShape, sequences: int, microbatches: int) -> float:
    """Bytes of a device, estimated: within a tenth of the compiled peaks of FLM-101B's stages on their meshes.

    The sum of the state, the gradients and their sum over microbatches, a copy in the dtype of matrix products; the
    residual stream of all layers and the arrays that remat keeps; and the larger of the loss's and one layer's arrays.

    Args:
        sequences: of one microbatch, on all devices.
    """
    width, copied = (2, 2) if model.dtype == "bfloat16" else (4, 0)
    tokens = sequences * model.max_length / mesh.data_shards  # of a microbatch, on one tensor group
    heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    outputs = {
        "full": 0,
        "dots": heads + model.mlp_dim + model.embed_dim,
        # The outputs of norms are kept as products read them, gathered over the tensor group.
        "none": 3 * heads + 3 * model.mlp_dim + (2 + 2 * mesh.tensor) * model.embed_dim,
    }
    state = num_parameters(model) * (12 + (8 if microbatches > 1 else 4) + copied) / (mesh.fsdp * mesh.tensor)
    kept = model.num_layers * tokens * width * (model.embed_dim + outputs[model.remat]) / mesh.tensor
    loss = tokens * model.padded_vocab_size * (4 + width) / mesh.tensor
    # Inputs and outputs of a layer's products; its weights, twice in flight; and their gradients in float32.
    layer = tokens * width * (4 * model.embed_dim + 3 * model.mlp_dim / mesh.tensor)
    layer += block_matrices(model) * (2 * width + 4) / mesh.tensor
    return state + kept + max(loss, layer)


def seconds(model: ModelConfig, batch_size: int, microbatches: int, mesh: MeshShape, topology: Topology) -> float:
    """Seconds of a step, estimated by `step_time` from the exchanges that compiled programs have.

    Args:
        batch_size: sequences of a step.
    """
    assert model.vocab_size is not None
    tokens = batch_size * model.max_length
    passes = 8 if model.remat == "full" else 6  # FLOPs of a parameter and token
    products = tokens * (passes * model.num_layers * block_matrices(model) + 6 * model.vocab_size * model.embed_dim)
    around = mesh.tensor * mesh.fsdp
    exchanges = _exchanges(model, tokens, microbatches, mesh, topology.node_size)
    return step_time(
        model,
        topology.chip,
        mesh,
        tokens=tokens / topology.num_devices,
        matmul_flops=products / topology.num_devices,
        attention_flops=fused_attention_flops(model, tokens / topology.num_devices),
        attention_products=0.0,  # nothing hides an exchange: only compiled programs tell what does
        state_bytes=12 * num_parameters(model) / around,
        timelines=[Timeline(1, (), tuple(Transfer(exchange, 0, 0) for exchange in exchanges))],
    ).seconds


def _exchanges(model: ModelConfig, tokens: int, microbatches: int, mesh: MeshShape, node_size: int) -> list[Collective]:
    """The collectives of a step on `tokens` tokens."""
    weights = 2 * model.num_layers * block_matrices(model) / mesh.tensor  # bytes in bfloat16, of a tensor group
    in_node = max(1, min(mesh.fsdp, node_size // mesh.tensor))
    share = (mesh.fsdp - 1) / mesh.fsdp
    stream = tokens / mesh.data_shards * model.embed_dim * 2 * model.num_layers
    stream *= (mesh.tensor - 1) / mesh.tensor
    exchanges = [
        # Weights are gathered forward and backward, gradients scattered in float32, in every microbatch.
        Collective("all-gather", "bf16", mesh.fsdp, mesh.tensor, in_node, 1, 2 * microbatches * weights * share, 0),
        Collective("reduce-scatter", "f32", mesh.fsdp, mesh.tensor, in_node, 1, 2 * microbatches * weights * share, 0),
        Collective("all-gather", "bf16", mesh.tensor, 1, mesh.tensor, 1, 6 * stream, 0),
        Collective("reduce-scatter", "bf16", mesh.tensor, 1, mesh.tensor, 1, 5 * stream, 0),
    ]
    # Gradients in float32 are summed over the replicas once a step.
    exchanges.append(replica_sum(2 * weights / mesh.fsdp, mesh, node_size))
    return [exchange for exchange in exchanges if exchange.group > 1]
