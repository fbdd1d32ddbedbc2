"""Search for the layout (mesh, microbatches, rematerialisation) that trains a run in the fewest days on a machine.

Every legal layout is estimated by formulas; the best are compiled, with more microbatches until they fit.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator

from flmjax.config import ConfigError, MeshShape, ModelConfig, Remat, RunConfig, Stage, StageConfig
from flmjax.config.validate import legal_microbatches, on_mesh, validate_mesh
from flmjax.hardware import GiB
from flmjax.model.flops import block_matrices, num_parameters
from flmjax.planning import cost
from flmjax.planning.compile import Compiler
from flmjax.planning.exchanges import Collective, Timeline, Transfer
from flmjax.planning.planner import growth_plan, stage_plan
from flmjax.planning.program import Program
from flmjax.planning.roofline import fused_attention_flops, step_time
from flmjax.planning.topology import PACKAGES, TooLargeError, Topology, parse_topology
from flmjax.text_table import text_table

TENSOR = (1, 2, 4, 8)  # sizes of tensor groups: those that lie inside one node of 8
LARGEST_FSDP = 64  # larger axes have smaller shards and longer rings, which the estimates do not price
SLACK = 1.1  # estimates of memory are a tenth off at most: a layout that is a tenth too large may fit once compiled

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout of a run.

    Attributes:
        mesh, remat: of all stages.
        microbatches: of each stage.
        days: of the run, estimated by formulas or from compiled programs.
        peak: most bytes of a device in any program; None: not compiled.
    """

    mesh: MeshShape
    remat: Remat
    microbatches: tuple[int, ...]
    days: float
    peak: int | None = None

    def flags(self) -> str:
        """The layout as flags of the command line."""
        flags = [f"--config.mesh.{axis}={getattr(self.mesh, axis)}" for axis in ("replica", "fsdp", "tensor")]
        flags.append(f"--config.model.remat={self.remat}")
        flags += [f"'--config.stages[{i}].microbatches={n}'" for i, n in enumerate(self.microbatches)]
        return " ".join(flags)

    def apply(self, config: RunConfig) -> RunConfig:
        """The run in this layout."""
        stages = tuple(
            dataclasses.replace(stage, microbatches=n)
            for stage, n in zip(config.stages, self.microbatches, strict=True)
        )
        model = dataclasses.replace(config.model, remat=self.remat)
        return on_mesh(dataclasses.replace(config, model=model, stages=stages), self.mesh)

    def __str__(self) -> str:
        return f"{_mesh_words(self.mesh)}, remat {self.remat}"


@dataclasses.dataclass(frozen=True)
class LayoutSearch:
    """Result of a search.

    Attributes:
        fitting: layouts whose compiled programs fit, fewest days first.
        possible: number of layouts that may fit by estimate.
        tried: number of these that were compiled.
    """

    fitting: tuple[Candidate, ...]
    possible: int
    tried: int


def search_layouts(config: RunConfig, log: Log = lambda _: None, tries: int = 3) -> LayoutSearch:
    """Compile layouts for mesh.topology, the best by estimate first, until `tries` of them fit with all their programs.

    Raises:
        ConfigError: when no layout is legal or none fits, and without the machine's compiler, which alone can tell.
    """
    topology = parse_topology(config.mesh.topology)
    candidates = estimates(config, topology)
    fitting: list[Candidate] = []
    growth_peaks: dict[MeshShape, int | None] = {}  # growths depend on the mesh alone; None: too large
    tried, reason = 0, ""
    for candidate in candidates:
        tried += 1
        log(f"{candidate}, estimated {candidate.days:.1f} days")
        try:
            compiler = Compiler(candidate.apply(config), topology)
            if candidate.mesh not in growth_peaks:
                growth_peaks[candidate.mesh] = None
                growth_peaks[candidate.mesh] = growth_peak(compiler, log)
            peak = growth_peaks[candidate.mesh]
            if peak is None:
                raise TooLargeError("the growths on this mesh are too large")
            compiled = fit(candidate, compiler, log)
        except TooLargeError as error:
            reason = str(error)
            log(f"  {reason}")
            continue
        log(f"  fits, {compiled.days:.1f} days")
        fitting.append(dataclasses.replace(compiled, peak=max(compiled.peak or 0, peak)))
        if len(fitting) == tries:
            break
    if not fitting:
        raise ConfigError(
            f"none of the {len(candidates)} layouts that may fit {topology.name} does; of the last one, {reason}"
        )
    return LayoutSearch(tuple(sorted(fitting, key=lambda candidate: candidate.days)), len(candidates), tried)


def growth_peak(compiler: Compiler, log: Log) -> int:
    """Most bytes of a device in the programs of all growths and in the last one's certificate.

    Raises:
        TooLargeError: naming the program that does not fit.
        ConfigError: without the machine's compiler.
    """
    _require_exact(compiler)
    schedule, peak = compiler.config.schedule, 0
    for stage in schedule[1:]:
        growth = growth_plan(compiler, stage, is_last=stage is schedule[-1], log=lambda text: log(f"  {text}"))
        for program in (growth.program, growth.certificate):
            if program is not None:
                _require_fit(program, compiler.topology)
                peak = max(peak, program.peak)
    return peak


def fit(candidate: Candidate, compiler: Compiler, log: Log) -> Candidate:
    """The candidate with as many microbatches as its compiled stages need to fit, and with their days and peak.

    Args:
        compiler: of the run in the candidate's layout.

    Raises:
        TooLargeError: naming the stage that fits with no number of microbatches.
        ConfigError: without the machine's compiler.
    """
    _require_exact(compiler)
    topology = compiler.topology
    machine = cost.machine_of(topology.chip, topology.num_devices, None)
    counts, peak, days = [], 0, 0.0
    for stage in reversed(compiler.config.schedule):  # the last is the largest: a layout that cannot fit fails early
        refusal: TooLargeError | None = None
        for count in _legal(stage.config, candidate.mesh):
            if count < stage.layout.microbatches:
                continue
            try:
                planned = stage_plan(compiler, _with_microbatches(stage, count), machine)
                log(f"  step of {stage.name} in {count} microbatches: {planned.program.peak / GiB:.1f} GiB")
                _require_fit(planned.program, topology)
            except TooLargeError as error:
                refusal = error
                continue
            refusal = None
            break
        if refusal is not None:
            raise refusal
        counts.append(count)
        peak, days = max(peak, planned.program.peak), days + planned.bill.days
    return dataclasses.replace(candidate, microbatches=tuple(reversed(counts)), peak=peak, days=days)


def _with_microbatches(stage: Stage, count: int) -> Stage:
    settings = dataclasses.replace(stage.config, microbatches=count)
    return dataclasses.replace(stage, config=settings, layout=stage.layout._replace(microbatches=count))


def _require_fit(program: Program, topology: Topology) -> None:
    if refusal := program.refusal(topology.chip, topology.usable):
        raise TooLargeError(refusal)


def _require_exact(compiler: Compiler) -> None:
    if not compiler.is_exact:
        raise ConfigError(
            f"the compiler of {compiler.topology.name} is missing, and without it no program is known to fit; "
            f"pip install '{PACKAGES[compiler.topology.platform]}'"
        )


def layout_table(search: LayoutSearch) -> str:
    """The layouts that fit as a table for a terminal, and the flags of the best."""
    rows = [("mesh", "remat", "microbatches", "days", "peak")]
    for candidate in search.fitting:
        microbatches = " / ".join(map(str, candidate.microbatches))
        peak = f"{(candidate.peak or 0) / GiB:.1f} GiB"
        rows.append((_mesh_words(candidate.mesh), candidate.remat, microbatches, f"{candidate.days:.1f}", peak))
    return "\n".join(
        [
            text_table(rows, left=3),
            f"compiled: the best {search.tried} by estimate of {search.possible} layouts that may fit",
            f"the fastest of them that fits: {search.fitting[0].flags()}",
        ]
    )


def _mesh_words(mesh: MeshShape) -> str:
    return f"replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor}"


# ---- estimates -------------------------------------------------------------------------------------------------------


def _legal(stage: StageConfig, mesh: MeshShape) -> list[int]:
    return legal_microbatches(stage, mesh.data_shards)


def meshes(config: RunConfig, devices: int) -> Iterator[MeshShape]:
    """Meshes of all `devices` over which the sizes and the batch of every stage divide."""
    for tensor in TENSOR:
        for fsdp in [n for n in range(1, LARGEST_FSDP + 1) if devices % (tensor * n) == 0]:
            mesh = MeshShape(devices // (tensor * fsdp), fsdp, tensor)
            stages = [dataclasses.replace(stage, microbatches=1) for stage in config.stages]
            try:
                validate_mesh(on_mesh(dataclasses.replace(config, stages=tuple(stages)), mesh), devices)
            except ConfigError:
                continue
            yield mesh


def estimates(config: RunConfig, topology: Topology) -> list[Candidate]:
    """Every legal layout with the fewest microbatches that may fit, fewest estimated days first.

    Raises:
        ConfigError: when no mesh divides the sizes or no layout may fit, and without a vocabulary size.
    """
    candidates = []
    steps = [stage.steps for stage in cost.stage_costs(config)]
    for mesh in meshes(config, topology.num_devices):
        if mesh.replica % topology.slices:
            continue
        for remat in typing.get_args(Remat):  # those that recompute less first
            counts, days = [], 0.0
            for stage, updates in zip(config.schedule, steps, strict=True):
                model, batch_size = dataclasses.replace(stage.model, remat=remat), stage.config.batch_size
                fitting = [
                    n
                    for n in _legal(stage.config, mesh)
                    if memory(model, mesh, batch_size // n, n) < SLACK * topology.usable
                ]
                if not fitting:
                    break
                counts.append(fitting[0])
                days += updates * seconds(model, batch_size, fitting[0], mesh, topology) / 86_400
            else:
                candidates.append(Candidate(mesh, remat, tuple(counts), days))
    if not candidates:
        raise ConfigError(
            f"no mesh of {topology.num_devices} devices that the sizes and batches divide over may fit the run"
        )
    return sorted(candidates, key=lambda candidate: candidate.days)


def memory(model: ModelConfig, mesh: MeshShape, sequences: int, microbatches: int) -> float:
    """Bytes of a device, estimated: within a tenth of the compiled peaks of FLM-101B's stages on their meshes.

    The sum of the state, the gradients and their sum over microbatches, a copy in the dtype of matrix products; the
    residual stream of all layers and the arrays that remat keeps; and the larger of the loss's and one layer's arrays.

    Args:
        sequences: of one microbatch, on all devices.
    """
    width, copied = (2, 2) if model.dtype == "bfloat16" else (4, 0)
    tokens = sequences * model.max_length / (mesh.data_shards)  # of a microbatch, on one tensor group
    heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    outputs = {
        "full": 0,
        "dots": heads + model.mlp_dim + model.embed_dim,
        "none": 4 * heads + 6 * model.mlp_dim + 8 * model.embed_dim,
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
    around = mesh.tensor * mesh.fsdp
    in_node = max(1, min(mesh.fsdp, node_size // mesh.tensor))
    share = (mesh.fsdp - 1) / mesh.fsdp
    stream = tokens / (mesh.data_shards) * model.embed_dim * 2 * model.num_layers
    stream *= (mesh.tensor - 1) / mesh.tensor
    exchanges = [
        # Weights are gathered forward and backward, gradients scattered, in every microbatch.
        Collective("all-gather", "bf16", mesh.fsdp, mesh.tensor, in_node, 1, 2 * microbatches * weights * share, 0),
        Collective("reduce-scatter", "bf16", mesh.fsdp, mesh.tensor, in_node, 1, microbatches * weights * share, 0),
        Collective("all-gather", "bf16", mesh.tensor, 1, mesh.tensor, 1, 6 * stream, 0),
        Collective("reduce-scatter", "bf16", mesh.tensor, 1, mesh.tensor, 1, 5 * stream, 0),
    ]
    if mesh.replica > 1:
        sent = 2 * (mesh.replica - 1) / mesh.replica * microbatches * weights / mesh.fsdp
        in_node = max(1, min(mesh.replica, node_size // around)) if around <= node_size else 1
        exchanges.append(Collective("all-reduce", "bf16", mesh.replica, around, in_node, 1, sent, 0))
    return [exchange for exchange in exchanges if exchange.group > 1]
