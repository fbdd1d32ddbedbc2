"""Search for the mesh, microbatches and rematerialisation that train a run cheapest on a machine, and fit it.

Every legal setting is estimated by formulas; the best few are compiled, with more microbatches until they fit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from flmjax.config import ConfigError, MeshConfig, ModelConfig, RunConfig, StageConfig
from flmjax.model.flops import block_matrices, num_parameters
from flmjax.scaling import cost
from flmjax.scaling.hlo import Collective
from flmjax.scaling.plan import PACKAGES, USABLE, TooLargeError, compiler_for, machine_of, stage_plan
from flmjax.scaling.roofline import fused_attention_flops, step_time
from flmjax.sharding.chips import Chip, GiB
from flmjax.validation import legal_microbatches, validate_mesh

TENSOR = (1, 2, 4, 8)  # groups that lie whole inside a node of 8
LARGEST_FSDP = 64  # more has smaller shards and longer rings, which nothing here prices
REMATS = ("dots", "full")  # the cheaper in time first


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


def tune(config: RunConfig, log: Callable[[str], None] = lambda _: None, tries: int = 3) -> list[Setting]:
    """The `tries` best settings by estimate, compiled; those that fit, cheapest first.

    Raises:
        ConfigError: when nothing is legal or nothing of them fits, and without the machine's own compiler: what fits
            cannot be known.
    """
    compiler_of, topology = compiler_for(config)
    usable = USABLE[topology.platform] * topology.chip.memory
    found = estimates(config, topology.chip, topology.num_devices, topology.node, usable)
    fitting = []
    for setting in found[:tries]:
        log(f"{_words(setting)}, estimated {setting.days:.1f} days")
        compiled = fit(setting, config, usable, compiler_of, log)
        if compiled is not None:
            fitting.append(compiled)
    if not fitting:
        raise ConfigError(f"none of the {len(found[:tries])} best settings fits {topology.name}; take more devices")
    return sorted(fitting, key=lambda setting: setting.days)


def fit(
    setting: Setting,
    config: RunConfig,
    usable: float,
    compiler_of: Callable[[RunConfig], Any],
    log: Callable[[str], None],
) -> Setting | None:
    """The setting with as many microbatches as its compiled stages need to fit; None if no number will do."""
    counts, peak, days = list(setting.microbatches), 0, 0.0
    for index in reversed(range(len(config.stages))):  # the last is the largest: what cannot fit is found out first
        for count in [n for n in _legal(config.stages[index], setting.mesh) if n >= counts[index]]:
            counts[index] = count
            chosen = dataclasses.replace(setting, microbatches=tuple(counts)).apply(config)
            compiler = compiler_of(chosen)
            if not compiler.is_exact:
                raise ConfigError(
                    f"the compiler of {compiler.topology.name} is missing, so what fits cannot be known; pip install "
                    f"'{PACKAGES[compiler.topology.platform]}'"
                )
            machine = machine_of(compiler.topology.chip, compiler.topology.num_devices, None)
            own = cost.stage_costs(chosen)[index]
            try:
                planned = stage_plan(compiler, index, own, machine, None)
            except TooLargeError:
                continue
            log(f"  {own.name} in {count} microbatches: {planned.program.peak / GiB:.1f} GiB")
            if planned.program.peak <= usable:
                break
        else:
            return None
        peak, days = max(peak, planned.program.peak), days + planned.bill.days
    return dataclasses.replace(setting, microbatches=tuple(counts), peak=peak, days=days)


def table(settings: list[Setting]) -> str:
    """Settings that fit, and the flags of the best."""
    lines = [
        f"{_words(setting)}, microbatches {' / '.join(map(str, setting.microbatches))}: {setting.days:.1f} days, "
        f"{(setting.peak or 0) / GiB:.1f} GiB"
        for setting in settings
    ]
    return "\n".join([*lines, f"the cheapest that fits: {settings[0].flags()}"])


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
        for fsdp in range(1, LARGEST_FSDP + 1):
            mesh = dataclasses.replace(config.mesh, replica=devices // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
            stages = [dataclasses.replace(stage, microbatches=1) for stage in config.stages]
            try:
                validate_mesh(dataclasses.replace(config, mesh=mesh, stages=tuple(stages)), devices)
            except ConfigError:
                continue
            yield mesh


def estimates(config: RunConfig, chip: Chip, devices: int, node: int, usable: float) -> list[Setting]:
    """Every legal setting with the fewest microbatches that should fit, fewest estimated days first.

    Raises:
        ConfigError: when the mesh's axes divide nothing, or nothing should fit.
    """
    found = []
    for mesh in meshes(config, devices):
        for remat in REMATS:
            models = [dataclasses.replace(model, remat=remat) for model in config.stage_models]
            counts, days = [], 0.0
            for stage, model in zip(config.stages, models, strict=True):
                fitting = [n for n in _legal(stage, mesh) if memory(model, mesh, stage.batch_size // n, n) < usable]
                if not fitting:
                    break
                counts.append(fitting[0])
                days += stage.steps * seconds(stage, model, mesh, fitting[0], chip, devices, node) / 86_400
            else:
                found.append(Setting(mesh, remat, tuple(counts), days))
    if not found:
        raise ConfigError(f"no mesh of {devices} devices that the sizes and batches divide over should fit the run")
    return sorted(found, key=lambda setting: setting.days)


def memory(model: ModelConfig, mesh: MeshConfig, rows: int, microbatches: int) -> float:
    """Bytes of a device, estimated: state, gradients, residual stream, logits, and what remat "dots" keeps."""
    assert mesh.fsdp is not None
    shards = mesh.fsdp * mesh.tensor
    tokens = rows * model.max_length / (mesh.replica * mesh.fsdp)  # of a microbatch, on one tensor group
    state = num_parameters(model) * (12 + (8 if microbatches > 1 else 4)) / shards
    residual = model.num_layers * tokens * model.embed_dim * 2 / mesh.tensor
    heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    kept = model.num_layers * tokens * 2 * (heads + model.mlp_dim) / mesh.tensor if model.remat == "dots" else 0.0
    logits = tokens * model.padded_vocab_size * 10 / mesh.tensor
    working = tokens * 2 * (4 * model.embed_dim + 3 * model.mlp_dim / mesh.tensor)
    return state + residual + kept + logits + working


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
