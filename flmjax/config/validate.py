"""Validation of settings: `validate` checks a run, `validate_meshes` checks it on a number of devices."""

import dataclasses
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from flmjax.config.convert import from_config_dict, to_json
from flmjax.config.errors import ConfigError, did_you_mean, shorten
from flmjax.config.families import GROWTH_FAMILIES
from flmjax.config.fields import (
    MESH_AXES,
    STAGE_SIZES,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    ScheduleSettings,
    StageConfig,
)
from flmjax.config.run import RunConfig, Stage
from flmjax.config.sample_ranges import parse_ranges
from flmjax.config.shapes import MeshShape, split_factor
from flmjax.config.values import FLOAT32_TINY, INT32_MAX, Range, local_path

VOCABULARIES = ("sentencepiece", "bytes", "cl100k")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def validate(config: RunConfig) -> RunConfig:
    """The config, checked against every rule that does not depend on the devices; numbers have their field's type.

    Raises:
        ConfigError: with one line that names the field, its value and valid values.
    """
    config = from_config_dict(to_json(config))  # refuses values of another type
    _require(len(config.stages) > 0, "stages is empty; a run needs at least one stage")
    if refusals := list(_refusals(config)):
        raise ConfigError("; ".join(refusals[:5]))
    _validate_model(config.model)
    _validate_data(config.data)
    if config.compile_cache is not None:
        folder = local_path(config.compile_cache, "compile_cache")
        _require(not folder.is_file(), f"compile_cache={folder} is a file; name a folder")
    for name in ("document_attention", "teachers"):
        if getattr(config.data, name):
            refuse_cudnn(config, f"data.{name}")
    for i, settings in enumerate(config.stages):
        _validate_stage(settings, f"stages[{i}]", config.data.num_sources)
    _validate_schedule(config.stages)
    _validate_roll_back(config)
    _require(
        config.total_steps <= INT32_MAX, f"stages have {config.total_steps} steps; at most {INT32_MAX} can be counted"
    )
    names = [stage.name for stage in config.stages]
    _require(len(set(names)) == len(names), f"stages have the same name: {', '.join(names)}")
    for stage in config.schedule[1:]:
        _validate_growth(stage)
    for stage in config.schedule:
        _validate_model(stage.model, f"stages[{stage.index}]")
    saved, kept = config.checkpoint.every, config.checkpoint.keep_every
    _require(
        kept is None or kept % saved == 0,
        f"checkpoint.keep_every={kept} must be a multiple of checkpoint.every={saved}, the steps that are saved",
    )
    return config


def _choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if refusal := _wrong_choice(path, value, choices):
        raise ConfigError(refusal)


def _wrong_choice(path: str, value: str, choices: tuple[str, ...]) -> str | None:
    return (
        None if value in choices else f"{path}='{value}'{did_you_mean(value, choices)}; choices: {', '.join(choices)}"
    )


def _refusals(settings: Any, path: str = "") -> Iterator[str]:
    """A refusal of every number outside its field's Range, and of every word outside its field's Literal."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{path}.{field.name}".strip(".")
        entries = (
            {f"{name}[{i}]": entry for i, entry in enumerate(value)} if isinstance(value, tuple) else {name: value}
        )
        for entry_name, entry in entries.items():
            if dataclasses.is_dataclass(entry):
                yield from _refusals(entry, entry_name)
            elif entry is not None:
                yield from filter(None, (_refusal(entry_name, entry, x) for x in constraints(hints[field.name])))


def _refusal(path: str, value: Any, constraint: Range | tuple[str, ...]) -> str | None:
    if not isinstance(constraint, Range):
        return _wrong_choice(path, value, constraint)
    violation = constraint.violation(value)
    return violation and f"{path}={shorten(value)} {violation}"


def constraints(hint: Any) -> Iterator[Range | tuple[str, ...]]:
    """The Range of the numbers, or the words of the Literal, in the type of a field."""
    if typing.get_origin(hint) is typing.Literal:
        yield typing.get_args(hint)
    elif isinstance(hint, Range):
        yield hint
    else:
        for part in typing.get_args(hint):  # of Annotated, of a union with None, of a tuple
            yield from constraints(part)


def _validate_model(m: ModelConfig, path: str = "model") -> None:
    for field in ("base_mlp_dim", "base_heads_dim"):
        _require(
            getattr(m, field) is None or m.base_embed_dim is not None,
            f"{path}.{field}={getattr(m, field)} is not read without {path}.base_embed_dim, which switches muP on",
        )
    _require(
        m.num_heads % m.kv_heads == 0, f"{path}.num_heads={m.num_heads} is not a multiple of num_kv_heads={m.kv_heads}"
    )
    if m.is_rotary:
        _require(m.head_dim % 2 == 0, f"{path}.head_dim={m.head_dim} must be even for position='{m.position}'")
        _require(
            m.rotated_dims % 2 == 0 and m.rotated_dims <= m.head_dim,
            f"{path}.rotary_dim={m.rotary_dim} must be even and at most head_dim={m.head_dim}",
        )
    if m.position == "xpos":
        longest = _longest_xpos(m)
        _require(
            m.max_length <= longest,
            f"{path}.max_length={m.max_length} is too long for xPos with xpos_scale_base={m.xpos_scale_base:g}: its "
            f"scale leaves the range of float32 above {longest} tokens; take a larger base or position='rope'",
        )


def _longest_xpos(m: ModelConfig) -> int:
    """Largest max_length at which the scales of xPos (model/positions.py) are normal numbers of the model's precision.

    The scale zeta^((position - max_length // 2) / scale_base) has its smallest zeta, 0.4 / 1.4, in the first pair, and
    its largest exponent at position 0. Queries are multiplied by it and keys by its inverse; the inverse of a number
    below the smallest normal one is infinite.
    """
    smallest = sys.float_info.min if m.dtype == "float64" else FLOAT32_TINY
    largest_power = math.log(1.0001 * smallest) / math.log(0.4 / 1.4)  # with room for rounding: 69.7 in float32
    return 2 * int(largest_power * m.xpos_scale_base) + 1


def _validate_weights(path: str, weights: tuple[float, ...] | None, num_sources: int | None) -> None:
    if weights is None:
        return
    _require(
        num_sources in (None, len(weights)), f"{path} has {len(weights)} entries for {num_sources} sources and teachers"
    )
    _require(any(weights), f"{path}={weights}: at least one weight must be positive")


def _validate_data(d: DataConfig) -> None:
    _require(len(d.sources) > 0, "data.sources is empty; name a built-in source, a file, a folder or a glob")
    names = (*d.sources, *d.teachers)
    twice = sorted({name for name in names if names.count(name) > 1})
    _require(not twice, f"data.sources or data.teachers names one twice: {shorten(', '.join(twice), str)}")
    _require(
        d.mixture is None or not d.teachers,
        f"data.teachers={d.teachers} is not read: data.mixture='{d.mixture}' defines the teachers",
    )
    _require(
        d.task_module is None or d.mixture is not None,
        f"data.task_module='{d.task_module}' is not read without data.mixture: name the Task or Mixture it registers",
    )
    _validate_weights("data.mixture_weights", d.mixture_weights, d.num_sources)
    if d.directory is not None:
        _require(
            local_path(d.directory, "data.directory").absolute().name != "",
            f"data.directory={d.directory} is the root of the file system; name a folder in it",
        )
    if d.vocabulary is not None and not local_path(d.vocabulary, "data.vocabulary").name.endswith(".model"):
        _choice("data.vocabulary", d.vocabulary, VOCABULARIES)
    _require(
        d.teacher_weight == 1.0 or d.teacher_mixing == "mixed",
        f"data.teacher_weight={d.teacher_weight} is not read with teacher_mixing='alternating': a batch of teachers "
        "alone is divided by its weights",
    )
    parse_ranges(d.skip_samples, "data.skip_samples")
    _require(bool(d.true_mark) and bool(d.false_mark), "data.true_mark and data.false_mark must not be empty")
    _require(d.true_mark != d.false_mark, f"data.true_mark and data.false_mark are both '{d.true_mark}'")


def _validate_stage(s: StageConfig, path: str, num_sources: int | None) -> None:
    _require(
        s.batch_size % s.microbatches == 0,
        f"{path}.batch_size={s.batch_size} is not a multiple of microbatches={s.microbatches}",
    )
    rates = s.schedule_settings
    _require(
        rates.warmup_steps < s.steps, f"{path}.warmup_steps={rates.warmup_steps} must be less than steps={s.steps}"
    )
    _require(
        rates.learning_rate >= rates.final_learning_rate,
        f"{path}: learning_rate={rates.learning_rate} must be at least final_learning_rate={rates.final_learning_rate}",
    )
    initial = rates.initial_learning_rate
    _require(
        rates.learning_rate >= initial,
        f"{path}: learning_rate={rates.learning_rate} must be at least initial_learning_rate={initial}",
    )
    _require(
        not initial or rates.warmup_steps > 0,
        f"{path}.initial_learning_rate={initial} is not read without {path}.warmup_steps, whose rates rise from it",
    )
    _validate_operator(s, f"{path}.growth")
    _validate_weights(f"{path}.mixture_weights", s.mixture_weights, num_sources)


def _validate_operator(s: StageConfig, path: str) -> None:
    g = s.growth
    if ":" not in g.family:
        _choice(f"{path}.family", g.family, tuple(GROWTH_FAMILIES))
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
    policy = stages[0].growth.rate_policy
    _require(
        policy == GrowthConfig().rate_policy,
        f"stages[0].growth.rate_policy='{policy}' is not read: the first stage starts a schedule",
    )
    for i, stage in enumerate(stages):
        for field in ScheduleSettings._fields if not stage.starts_schedule(i) else ():
            _require(
                getattr(stage, field) is None,
                f"stages[{i}].{field}={getattr(stage, field)} is not read: stages[{i}].growth.rate_policy="
                f"'{stage.growth.rate_policy}' continues the schedule before it; 'stage' would start this one",
            )


def _validate_roll_back(config: RunConfig) -> None:
    """Check that a checkpoint which is old enough for a roll-back is kept.

    The newest may be of the step before the spike, and two of the others are of a growth: before and after it.
    """
    settings, steps = config.checkpoint, config.spike.roll_back_steps
    extra = 1 if len(config.stages) == 1 else 3
    _require(
        config.spike.action != "roll_back" or steps <= (settings.keep - extra) * settings.every,
        f"spike.roll_back_steps={steps} needs a checkpoint of that age, but checkpoint.keep={settings.keep} with "
        f"checkpoint.every={settings.every} may keep none; keep={-(-steps // settings.every) + extra} does",
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


def refuse_cudnn(config: RunConfig, cause: str) -> None:
    """Refuse cuDNN's attention, which cannot keep the documents of a sequence apart, in every stage.

    Args:
        cause: the setting or the data that needs documents kept apart, for the message.

    Raises:
        ConfigError: naming the setting of the attention.
    """
    for stage in config.schedule:
        _require(
            stage.layout.attention != "cudnn",
            f"{stage.setting_of('attention')}='cudnn' cannot keep the documents of a sequence apart; {cause} needs "
            "that: take 'plain'",
        )


def validate_meshes(config: RunConfig, num_devices: int) -> tuple[MeshShape, ...]:
    """Shape of the mesh of every stage on `num_devices` devices; raises as stage_mesh."""
    return tuple(stage_mesh(config, stage, num_devices) for stage in config.schedule)


def stage_mesh(config: RunConfig, stage: Stage, num_devices: int) -> MeshShape:
    """Shape of a stage's mesh on `num_devices` devices, checked: every size and every microbatch divides over it.

    Raises:
        ConfigError: naming the stage, the size, the mesh axis and both numbers.
    """
    axes = stage.layout.mesh
    # fsdp=None takes the remaining devices, but at least one.
    fsdp = max(num_devices // (axes.replica * axes.tensor), 1) if axes.fsdp is None else axes.fsdp
    mesh = MeshShape(axes.replica, fsdp, axes.tensor)
    if mesh.num_devices != num_devices:
        sharing = [other for other in config.schedule if other.layout.mesh == axes]
        raise ConfigError(
            f"{stage.setting_of('mesh')}: replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor} has "
            f"{mesh.num_devices} places for {num_devices} devices; {_matching_mesh(sharing, mesh, num_devices)}"
        )
    check_stage(stage, mesh)
    return mesh


def check_stage(stage: Stage, mesh: MeshShape) -> None:
    """Check that every size and every microbatch of a stage divides over `mesh`; raises as stage_mesh."""
    rows, shards = stage.config.batch_size // stage.layout.microbatches, mesh.data_shards
    _require(
        rows % shards == 0,
        f"stages[{stage.index}]: the {rows} sequences of a microbatch (batch_size / microbatches) do not divide over "
        f"the {shards} data shards of the mesh (replica x fsdp); {_legal_batches(stage.config, shards)}",
    )
    check_mesh(stage.model, mesh, f"stages[{stage.index}]")


def _matching_mesh(stages: Sequence[Stage], mesh: MeshShape, num_devices: int) -> str:
    """Advice: the mesh of all devices, valid for `stages`, that differs in the fewest axes and by the least factors."""

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
            for stage in stages:
                check_stage(stage, other)
        except ConfigError:
            continue
        changed = [axis for axis in MESH_AXES if getattr(other, axis) != getattr(mesh, axis)]
        return ", ".join(f"{axis}={getattr(other, axis)}" for axis in changed) + " would match"
    return f"no mesh of {num_devices} devices divides these sizes, batches and microbatches"


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
    """Check that every size of a model divides over `mesh`. The vocabulary is padded so that it does.

    Raises:
        ConfigError: naming the size, the mesh axis and both numbers.
    """
    for name, size, axis in (
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
