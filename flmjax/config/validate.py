"""Validation of settings: `validate` checks a run, `validate_mesh` checks it on a number of devices."""

import dataclasses
import math
import typing
from typing import Any

from flmjax.config.errors import ConfigError, nearest
from flmjax.config.families import GROWTH_FAMILIES
from flmjax.config.fields import (
    MESH_AXES,
    STAGE_SIZES,
    DataConfig,
    GrowthConfig,
    MeshShape,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Stage,
    StageConfig,
    split_factor,
)

VOCABULARIES = ("sentencepiece", "bytes", "cl100k")
SCHEDULE_FIELDS = ("learning_rate", "final_learning_rate", "warmup_steps", "schedule", "decay_fraction")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def validate(config: RunConfig) -> RunConfig:
    """The config, checked against every rule that does not depend on the devices.

    Raises:
        ConfigError: with one line that names the field, its value and valid values.
    """
    _validate_choices(config)
    _validate_model(config.model)
    _validate_optimizer(config.optimizer)
    _validate_data(config.data)
    apart = "data.document_attention" if config.data.document_attention else "data.teachers"
    _require(
        config.model.attention != "cudnn" or not (config.data.document_attention or config.data.teachers),
        f"model.attention='cudnn' cannot keep a row's documents apart, which {apart} requires; take 'plain'",
    )
    for axis in MESH_AXES:
        size = getattr(config.mesh, axis)
        _require(size is None or size > 0, f"mesh.{axis}={size} must be positive")
    _require(len(config.stages) > 0, "stages is empty; a run needs at least one stage")
    for i, settings in enumerate(config.stages):
        _validate_stage(settings, f"stages[{i}]", config.data.num_sources)
    _validate_schedule(config.stages)
    names = [stage.name for stage in config.stages]
    _require(len(set(names)) == len(names), f"stages have the same name: {', '.join(names)}")
    for stage in config.schedule[1:]:
        _validate_growth(stage)
    for stage in config.schedule:
        _validate_model(stage.model, f"stages[{stage.index}]")
    for field in ("log_every", "evaluate_every", "evaluation_rows", "certificate_rows"):
        _require(getattr(config, field) > 0, f"{field}={getattr(config, field)} must be positive")
    _require(config.checkpoint.every > 0, f"checkpoint.every={config.checkpoint.every} must be positive")
    _require(config.checkpoint.keep > 0, f"checkpoint.keep={config.checkpoint.keep} must be positive")
    _require(
        math.isfinite(config.certificate_tolerance) and config.certificate_tolerance > 0,
        f"certificate_tolerance={config.certificate_tolerance} must be positive",
    )
    _require(config.sample_tokens >= 0, f"sample_tokens={config.sample_tokens} must not be negative")
    return config


def _choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest(value, choices)
        listed = "" if "choices:" in hint else f"; choices: {', '.join(choices)}"
        raise ConfigError(f"{path}='{value}'{hint}{listed}")


def _validate_choices(config: Any, path: str = "") -> None:
    """Check that every field whose type is a Literal has one of its words."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}".strip(".")
        if typing.get_origin(hints[field.name]) is typing.Literal:
            _choice(name, value, typing.get_args(hints[field.name]))
        elif dataclasses.is_dataclass(value):
            _validate_choices(value, name)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, entry in enumerate(value):
                _validate_choices(entry, f"{name}[{i}]")


def _validate_model(m: ModelConfig, path: str = "model") -> None:
    for field in ("num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim", "max_length", "vocab_multiple"):
        _require(getattr(m, field) > 0, f"{path}.{field}={getattr(m, field)} must be positive")
    for field in ("rotary_dim", "base_embed_dim", "base_mlp_dim", "base_heads_dim"):
        _require(
            getattr(m, field) is None or getattr(m, field) > 0, f"{path}.{field}={getattr(m, field)} must be positive"
        )
    for field in ("base_mlp_dim", "base_heads_dim"):
        _require(
            getattr(m, field) is None or m.base_embed_dim is not None,
            f"{path}.{field}={getattr(m, field)} is not read without {path}.base_embed_dim, which switches muP on",
        )
    for field in ("norm_eps", "softmax_temperature", "rope_theta", "xpos_scale_base", "init_std"):
        value = getattr(m, field)
        _require(math.isfinite(value) and value > 0, f"{path}.{field}={value} must be positive")
    _require(m.vocab_size is None or m.vocab_size > 1, f"{path}.vocab_size={m.vocab_size} must be at least 2")
    _require(0.0 <= m.dropout < 1.0, f"{path}.dropout={m.dropout} must lie in [0, 1)")
    _require(
        m.kv_heads > 0 and m.num_heads % m.kv_heads == 0,
        f"{path}.num_heads={m.num_heads} is not a multiple of num_kv_heads={m.kv_heads}",
    )
    if m.is_rotary:
        _require(m.head_dim % 2 == 0, f"{path}.head_dim={m.head_dim} must be even for position='{m.position}'")
        _require(
            m.rotated_dims % 2 == 0 and m.rotated_dims <= m.head_dim,
            f"{path}.rotary_dim={m.rotary_dim} must be even and at most head_dim={m.head_dim}",
        )
    _require(m.scan_unroll > 0, f"{path}.scan_unroll={m.scan_unroll} must be positive")


def _validate_optimizer(o: OptimizerConfig) -> None:
    for field in ("b1", "b2"):
        _require(0.0 <= getattr(o, field) < 1.0, f"optimizer.{field}={getattr(o, field)} must lie in [0, 1)")
    _require(o.eps > 0, f"optimizer.eps={o.eps} must be positive")
    _require(o.weight_decay >= 0, f"optimizer.weight_decay={o.weight_decay} must not be negative")
    _require(
        o.clip_norm is None or (math.isfinite(o.clip_norm) and o.clip_norm > 0),
        f"optimizer.clip_norm={o.clip_norm} must be positive, or None for no clipping",
    )
    _require(o.max_skipped_updates > 0, "optimizer.max_skipped_updates must be positive")


def _validate_weights(path: str, weights: tuple[float, ...] | None, num_sources: int | None) -> None:
    if weights is None:
        return
    _require(
        num_sources in (None, len(weights)), f"{path} has {len(weights)} entries for {num_sources} sources and teachers"
    )
    for weight in weights:
        _require(
            math.isfinite(weight) and weight >= 0, f"{path}: {weight} must be positive, or 0 to leave a source out"
        )
    _require(any(weights), f"{path}={weights}: at least one weight must be positive")


def _validate_data(d: DataConfig) -> None:
    _require(len(d.sources) > 0, "data.sources is empty; name a built-in source, a file, a folder or a glob")
    names = (*d.sources, *d.teachers)
    _require(len(set(names)) == len(names), f"data.sources or data.teachers names one twice: {', '.join(names)}")
    _require(
        d.mixture is None or not d.teachers,
        f"data.teachers={d.teachers} is not read: data.mixture='{d.mixture}' defines the teachers",
    )
    _require(
        d.task_module is None or d.mixture is not None,
        f"data.task_module='{d.task_module}' is not read without data.mixture: name the Task or Mixture it registers",
    )
    _validate_weights("data.mixture_weights", d.mixture_weights, d.num_sources)
    if d.vocabulary is not None and not d.vocabulary.endswith(".model"):
        _choice("data.vocabulary", d.vocabulary, VOCABULARIES)
    _require(d.vocab_size >= 300, f"data.vocab_size={d.vocab_size} must be at least 300 (256 bytes and a few pieces)")
    _require(d.end_id is None or d.end_id >= 0, f"data.end_id={d.end_id} must not be negative")
    _require(
        0.0 < d.validation_fraction < 0.5, f"data.validation_fraction={d.validation_fraction} must lie in (0, 0.5)"
    )
    _require(
        math.isfinite(d.teacher_weight) and d.teacher_weight > 0,
        f"data.teacher_weight={d.teacher_weight} must be positive",
    )
    _require(
        d.teacher_weight == 1.0 or d.teacher_mixing == "mixed",
        f"data.teacher_weight={d.teacher_weight} is not read with teacher_mixing='alternating': a batch of teachers "
        "alone is divided by its weights",
    )
    _require(d.workers is None or d.workers > 0, f"data.workers={d.workers} must be positive")
    _require(bool(d.true_mark) and bool(d.false_mark), "data.true_mark and data.false_mark must not be empty")
    _require(d.true_mark != d.false_mark, f"data.true_mark and data.false_mark are both '{d.true_mark}'")


def _validate_stage(s: StageConfig, path: str, num_sources: int | None) -> None:
    for field in ("steps", "batch_size", "microbatches"):
        _require(getattr(s, field) > 0, f"{path}.{field}={getattr(s, field)} must be positive")
    _require(
        s.batch_size % s.microbatches == 0,
        f"{path}.batch_size={s.batch_size} is not a multiple of microbatches={s.microbatches}",
    )
    _require(0 <= s.warmup_steps < s.steps, f"{path}.warmup_steps={s.warmup_steps} must be less than steps={s.steps}")
    _require(
        math.isfinite(s.learning_rate) and s.learning_rate >= s.final_learning_rate >= 0,
        f"{path}: learning_rate={s.learning_rate} must be at least final_learning_rate={s.final_learning_rate} >= 0",
    )
    _require(0 < s.decay_fraction <= 1, f"{path}.decay_fraction={s.decay_fraction} must lie in (0, 1]")
    _validate_operator(s, f"{path}.growth")
    _validate_weights(f"{path}.mixture_weights", s.mixture_weights, num_sources)


def _validate_operator(s: StageConfig, path: str) -> None:
    g = s.growth
    if ":" not in g.family:
        _choice(f"{path}.family", g.family, tuple(GROWTH_FAMILIES))
    for field in ("shrink", "rewarm_fraction", "new_warmup_fraction"):
        _require(0.0 <= getattr(g, field) <= 1.0, f"{path}.{field}={getattr(g, field)} must lie in [0, 1]")
    _require(0 < g.split_gap < 0.5, f"{path}.split_gap={g.split_gap} must lie in (0, 0.5)")
    _require(g.tuning_steps >= 0, f"{path}.tuning_steps={g.tuning_steps} must not be negative")
    _require(
        math.isfinite(g.tuning_learning_rate) and g.tuning_learning_rate > 0,
        f"{path}.tuning_learning_rate={g.tuning_learning_rate} must be positive",
    )
    _require(
        "ramp_steps" not in g.traits.settings or 0 < g.ramp_steps <= s.steps,
        f"{path}.ramp_steps={g.ramp_steps} must be 1 to the stage's steps={s.steps} for family '{g.family}'",
    )
    for family, traits in GROWTH_FAMILIES.items():
        for field in traits.settings:
            _require(
                field in g.traits.settings or getattr(g, field) == getattr(GrowthConfig(), field),
                f"{path}.{field}={getattr(g, field)} is not read by family '{g.family}', only by '{family}'",
            )


def _validate_schedule(stages: tuple[StageConfig, ...]) -> None:
    """Check that stages that continue a schedule have no schedule settings, which would be ignored."""
    default = StageConfig()
    _require(
        stages[0].growth.rate_policy == default.growth.rate_policy,
        f"stages[0].growth.rate_policy='{stages[0].growth.rate_policy}' is not read: the first stage starts a schedule",
    )
    for i, stage in enumerate(stages[1:], start=1):
        for field in SCHEDULE_FIELDS if stage.growth.rate_policy != "stage" else ():
            _require(
                getattr(stage, field) == getattr(default, field),
                f"stages[{i}].{field}={getattr(stage, field)} is not read: stages[{i}].growth.rate_policy="
                f"'{stage.growth.rate_policy}' continues the schedule before it; 'stage' would start this one",
            )


def _validate_growth(stage: Stage) -> None:
    assert stage.previous is not None
    old, new, path = stage.previous.model, stage.model, f"stages[{stage.index}]"
    for field in STAGE_SIZES:
        before, after = getattr(old, field), getattr(new, field)
        if field == "num_kv_heads":
            before, after = old.kv_heads, new.kv_heads
        _require(after >= before, f"{path}.{field}={after} is smaller than {before} of the stage before; stages grow")
    try:
        split_factor(old, new)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def validate_mesh(config: RunConfig, num_devices: int) -> MeshShape:
    """Shape of the run's mesh on `num_devices` devices, checked: every size and every microbatch divides over it.

    Raises:
        ConfigError: naming the size, the mesh axis and both numbers.
    """
    replica, tensor = config.mesh.replica, config.mesh.tensor
    # fsdp=None takes the remaining devices, but at least one.
    fsdp = max(num_devices // (replica * tensor), 1) if config.mesh.fsdp is None else config.mesh.fsdp
    mesh = MeshShape(replica, fsdp, tensor)
    if mesh.num_devices != num_devices:
        raise ConfigError(
            f"mesh: replica {replica} x fsdp {fsdp} x tensor {tensor} has {mesh.num_devices} places for {num_devices} "
            f"devices; {_filling_mesh(config, mesh, num_devices)}"
        )
    for stage in config.schedule:
        rows, shards = stage.config.batch_size // stage.layout.microbatches, mesh.data_shards
        _require(
            rows % shards == 0,
            f"stages[{stage.index}]: batch_size / microbatches={rows} does not divide over mesh axis replica x "
            f"fsdp={shards}; {_legal_batches(stage.config, shards)}",
        )
        check_mesh(stage.model, mesh, f"stages[{stage.index}]")
    return mesh


def _filling_mesh(config: RunConfig, mesh: MeshShape, num_devices: int) -> str:
    """Advice: the valid mesh of all devices that differs in the fewest axes, and there by the smallest factors."""

    def distance(other: MeshShape) -> tuple[int, float]:
        ratios = [getattr(other, axis) / getattr(mesh, axis) for axis in MESH_AXES]
        return sum(ratio != 1 for ratio in ratios), sum(abs(math.log(ratio)) for ratio in ratios)

    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    meshes = [
        MeshShape(num_devices // (fsdp * tensor), fsdp, tensor)
        for fsdp in divisors
        for tensor in divisors
        if num_devices % (fsdp * tensor) == 0
    ]
    for other in sorted(meshes, key=distance):
        try:
            validate_mesh(on_mesh(config, other), num_devices)
        except ConfigError:
            continue
        changed = [axis for axis in MESH_AXES if getattr(other, axis) != getattr(mesh, axis)]
        return ", ".join(f"{axis}={getattr(other, axis)}" for axis in changed) + " would fill them"
    return f"no mesh of {num_devices} devices divides these sizes, batches and microbatches"


def on_mesh(config: RunConfig, mesh: MeshShape) -> RunConfig:
    """The config with another mesh shape; the topology stays."""
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **dataclasses.asdict(mesh)))


def legal_microbatches(stage: StageConfig, data_shards: int) -> list[int]:
    """Numbers of microbatches whose sequences divide over the data shards, in rising order."""
    rows, rest = divmod(stage.batch_size, data_shards)
    return [] if rest else [n for n in range(1, rows + 1) if rows % n == 0]


def _legal_batches(stage: StageConfig, data_shards: int) -> str:
    """Advice: the nearest number of microbatches that divides, or the nearest batch sizes."""
    if counts := legal_microbatches(stage, data_shards):
        nearest_count = min(counts, key=lambda k: abs(k - stage.microbatches))
        return f"microbatches={nearest_count} would"
    unit = data_shards * stage.microbatches
    below = stage.batch_size // unit * unit
    return " or ".join(f"batch_size={size}" for size in (below, below + unit) if size) + " would"


def check_mesh(model: ModelConfig, mesh: MeshShape, path: str) -> None:
    """Check that every size of a model divides over `mesh`.

    Raises:
        ConfigError: naming the size, the mesh axis and both numbers.
    """
    vocabulary = 0 if model.vocab_size is None else model.padded_vocab_size
    for name, size, axis in (
        ("padded vocab_size", vocabulary, "tensor"),
        ("embed_dim", model.embed_dim, "fsdp"),
        ("mlp_dim", model.mlp_dim, "tensor"),
        ("num_heads", model.num_heads, "tensor"),
        ("num_kv_heads", model.kv_heads, "tensor"),
        ("max_length", model.max_length, "tensor"),
    ):
        parts = getattr(mesh, axis)
        legal = max(n for n in range(1, parts + 1) if size % n == 0)
        _require(
            size % parts == 0,
            f"{path}: {name}={size} does not divide over mesh axis {axis}={parts}; {axis}={legal} would",
        )
