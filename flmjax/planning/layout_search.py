"""Search for the mesh, microbatches and rematerialisation that train a run cheapest on a machine, and fit it.

Every legal setting is estimated by formulas; the best are compiled, with more microbatches until they fit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from flmjax.config import ConfigError, MeshConfig, ModelConfig, RunConfig, StageConfig
from flmjax.config.validate import REMATS, legal_microbatches, validate_mesh
from flmjax.hardware import Chip, GiB
from flmjax.model.flops import block_matrices, num_parameters
from flmjax.planning import cost
from flmjax.planning.hlo import Collective
from flmjax.planning.plan import compiler_for, growth_plan, growth_refusals, machine_of, refusals, stage_plan, step_of
from flmjax.planning.roofline import fused_attention_flops, step_time
from flmjax.planning.topology import PACKAGES, USABLE, TooLargeError

TENSOR = (1, 2, 4, 8)  # groups that lie whole inside a node of 8
LARGEST_FSDP = 64  # more has smaller shards and longer rings, which nothing here prices
SLACK = 1.1  # estimates of memory are no closer: what is a tenth over may fit, and compiling tells


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train a run. days: estimated, or from compiled programs; peak: bytes, None before it is compiled."""

    mesh: MeshConfig
    remat: str
    microbatches: tuple[int, ...]
    days: float
    peak: int | None = None

    def flags(self) -> str:
        """What the command line takes for it."""
        flags = [f"--config.mesh.{axis}={getattr(self.mesh, axis)}" for axis in ("replica", "fsdp", "tensor")]
        flags.append(f"--config.model.remat={self.remat}")
        flags += [f"'--config.stages[{i}].microbatches={n}'" for i, n in enumerate(self.microbatches)]
        return " ".join(flags)

    def apply(self, config: RunConfig) -> RunConfig:
        """The run with this setting."""
        stages = tuple(
            dataclasses.replace(stage, microbatches=n)
            for stage, n in zip(config.stages, self.microbatches, strict=True)
        )
        model = dataclasses.replace(config.model, remat=self.remat)
        return dataclasses.replace(config, model=model, mesh=self.mesh, stages=stages)


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found: settings that fit, cheapest first; possible: that may fit by estimate, tried: of them."""

    settings: tuple[Setting, ...]
    possible: int
    tried: int


def tune(config: RunConfig, log: Callable[[str], None] = lambda _: None, tries: int = 3) -> Search:
    """Compile settings, the best by estimate first, until `tries` of them fit with all their programs.

    Raises:
        ConfigError: when nothing is legal or nothing fits, and without the machine's own compiler: what fits cannot be
            known.
    """
    compiler_of, topology = compiler_for(config)
    usable = USABLE[topology.platform] * topology.chip.memory
    found = estimates(config, topology.chip, topology.num_devices, topology.node, usable)
    fitting: list[Setting] = []
    growths: dict[MeshConfig, int | None] = {}  # peaks: growths depend on the mesh alone; None: too large
    tried, reason = 0, ""
    for setting in found:
        tried += 1
        log(f"{_words(setting)}, estimated {setting.days:.1f} days")
        try:
            if setting.mesh not in growths:
                growths[setting.mesh] = None
                growths[setting.mesh] = growth_peak(compiler_of(setting.apply(config)), usable, log)
            beside = growths[setting.mesh]
            if beside is None:
                log("  its growths are too large")
                continue
            chosen = fit(setting, config, usable, compiler_of, log)
        except TooLargeError as error:
            reason = str(error)
            log(f"  {reason}")
            continue
        chosen = dataclasses.replace(chosen, peak=max(chosen.peak or 0, beside))
        log(f"  fits, {chosen.days:.1f} days")
        fitting.append(chosen)
        if len(fitting) == tries:
            break
    if not fitting:
        raise ConfigError(f"none of {len(found)} settings that may fit {topology.name} does; of the last, {reason}")
    return Search(tuple(sorted(fitting, key=lambda setting: setting.days)), len(found), tried)


def growth_peak(compiler: Any, usable: float, log: Callable[[str], None]) -> int:
    """Most bytes of a growth's programs and of the last one's certificate.

    Raises:
        TooLargeError: naming the one that does not fit.
        ConfigError: without the machine's own compiler.
    """
    _require_exact(compiler)
    peak = 0
    for index in range(1, len(compiler.config.stages)):
        growth = growth_plan(compiler, index, lambda text: log(f"  {text}"))
        if lines := growth_refusals(
            compiler.config, index, compiler.mesh_config, growth, compiler.topology.chip, usable
        ):
            raise TooLargeError(lines[0])
        peak = max(peak, growth.program.peak, 0 if growth.certificate is None else growth.certificate.peak)
    return peak


def fit(
    setting: Setting,
    config: RunConfig,
    usable: float,
    compiler_of: Callable[[RunConfig], Any],
    log: Callable[[str], None],
) -> Setting:
    """The setting with as many microbatches as its compiled stages need to fit.

    Raises:
        TooLargeError: naming the stage that fits with no number of them.
        ConfigError: without the machine's own compiler.
    """
    counts, peak, days = list(setting.microbatches), 0, 0.0
    for index in reversed(range(len(config.stages))):  # the last is the largest: what cannot fit is found out first
        refused: list[str] = []
        for count in [n for n in _legal(config.stages[index], setting.mesh) if n >= counts[index]]:
            counts[index] = count
            chosen = dataclasses.replace(setting, microbatches=tuple(counts)).apply(config)
            compiler = compiler_of(chosen)
            _require_exact(compiler)
            chip = compiler.topology.chip
            machine = machine_of(chip, compiler.topology.num_devices, None)
            own = cost.stage_costs(chosen)[index]
            try:
                planned = stage_plan(compiler, index, own, machine, None)
            except TooLargeError as error:
                refused = [str(error)]
                continue
            log(f"  step of {own.name} in {count} microbatches: {planned.program.peak / GiB:.1f} GiB")
            refused = refusals(step_of(chosen, index, setting.mesh), planned.program, chip, usable)
            if not refused:
                break
        if refused:
            raise TooLargeError(refused[0])
        peak, days = max(peak, planned.program.peak), days + planned.bill.days
    return dataclasses.replace(setting, microbatches=tuple(counts), peak=peak, days=days)


def _require_exact(compiler: Any) -> None:
    if not compiler.is_exact:
        raise ConfigError(
            f"the compiler of {compiler.topology.name} is missing, so what fits cannot be known; pip install "
            f"'{PACKAGES[compiler.topology.platform]}'"
        )


def table(search: Search) -> str:
    """Settings that fit, and the flags of the best."""
    lines = [
        f"{_words(setting)}, microbatches {' / '.join(map(str, setting.microbatches))}: {setting.days:.1f} days, "
        f"{(setting.peak or 0) / GiB:.1f} GiB"
        for setting in search.settings
    ]
    lines.append(f"tried: the best {search.tried} by estimate of {search.possible} settings that may fit")
    return "\n".join([*lines, f"the cheapest of them that fits: {search.settings[0].flags()}"])


def _words(setting: Setting) -> str:
    mesh = setting.mesh
    return f"replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, remat {setting.remat}"


# ---- estimates -------------------------------------------------------------------------------------------------------


def _legal(stage: StageConfig, mesh: MeshConfig) -> list[int]:
    assert mesh.fsdp is not None
    return legal_microbatches(stage, mesh.replica * mesh.fsdp)


def meshes(config: RunConfig, devices: int) -> Iterator[MeshConfig]:
    """Meshes of all `devices` that every stage's sizes and batch divide over."""
    for tensor in TENSOR:
        for fsdp in [n for n in range(1, LARGEST_FSDP + 1) if devices % (tensor * n) == 0]:
            mesh = dataclasses.replace(config.mesh, replica=devices // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
            stages = [dataclasses.replace(stage, microbatches=1) for stage in config.stages]
            try:
                validate_mesh(dataclasses.replace(config, mesh=mesh, stages=tuple(stages)), devices)
            except ConfigError:
                continue
            yield mesh


def estimates(config: RunConfig, chip: Chip, devices: int, node: int, usable: float) -> list[Setting]:
    """Every legal setting with the fewest microbatches that may fit, fewest estimated days first.

    Raises:
        ConfigError: when the mesh's axes divide nothing, or nothing may fit, and without a vocabulary size.
    """
    found = []
    steps = [own.steps for own in cost.stage_costs(config)]
    for mesh in meshes(config, devices):
        for remat in REMATS:  # those that recompute less first
            models = [dataclasses.replace(model, remat=remat) for model in config.stage_models]
            counts, days = [], 0.0
            for stage, model, updates in zip(config.stages, models, steps, strict=True):
                fitting = [
                    n for n in _legal(stage, mesh) if memory(model, mesh, stage.batch_size // n, n) < SLACK * usable
                ]
                if not fitting:
                    break
                counts.append(fitting[0])
                days += updates * seconds(stage, model, mesh, fitting[0], chip, devices, node) / 86_400
            else:
                found.append(Setting(mesh, remat, tuple(counts), days))
    if not found:
        raise ConfigError(f"no mesh of {devices} devices that the sizes and batches divide over may fit the run")
    return sorted(found, key=lambda setting: setting.days)


def memory(model: ModelConfig, mesh: MeshConfig, rows: int, microbatches: int) -> float:
    """Bytes of a device, estimated: within a tenth of what was compiled for FLM-101B's stages on their own meshes.

    State, gradients and their sum over microbatches, a copy in the dtype of matrix products; the residual stream of all
    layers and what remat keeps beside it; and the larger of the loss's and of one layer's own arrays.
    """
    assert mesh.fsdp is not None
    width, copied = (2, 2) if model.dtype == "bfloat16" else (4, 0)
    tokens = rows * model.max_length / (mesh.replica * mesh.fsdp)  # of a microbatch, on one tensor group
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


def seconds(
    stage: StageConfig, model: ModelConfig, mesh: MeshConfig, microbatches: int, chip: Chip, devices: int, node: int
) -> float:
    """Seconds of a step, estimated as `step_time` does, from exchanges that programs were seen to have."""
    assert mesh.fsdp is not None
    assert model.vocab_size is not None
    tokens = stage.batch_size * model.max_length
    passes = 8 if model.remat == "full" else 6  # FLOPs of a parameter and token
    products = tokens * (passes * model.num_layers * block_matrices(model) + 6 * model.vocab_size * model.embed_dim)
    weights = 2 * model.num_layers * block_matrices(model) / mesh.tensor  # bytes in bfloat16, of a tensor group
    around = mesh.tensor * mesh.fsdp
    in_node = max(1, min(mesh.fsdp, node // mesh.tensor))
    share = (mesh.fsdp - 1) / mesh.fsdp
    stream = tokens / (mesh.replica * mesh.fsdp) * model.embed_dim * 2 * model.num_layers
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
        in_node = max(1, min(mesh.replica, node // around)) if around <= node else 1
        exchanges.append(Collective("all-reduce", "bf16", mesh.replica, around, in_node, 1, sent, 0))
    return step_time(
        model,
        chip,
        mesh,
        tokens=tokens / devices,
        matmul_flops=products / devices,
        attention_flops=fused_attention_flops(model, tokens / devices),
        state_bytes=12 * num_parameters(model) / around,
        collectives=[exchange for exchange in exchanges if exchange.group > 1],
    ).seconds
