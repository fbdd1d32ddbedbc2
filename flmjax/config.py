"""Every setting of a run: frozen dataclasses, one conversion to and from ml_collections, one validate()."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
POSITIONS = ("xpos", "rope", "learned")
ATTENTIONS = ("plain", "fused", "cudnn", "splash")
REMATS = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16", "float64")
SCHEDULES = ("constant", "cosine", "wsd")
VOCABULARIES = ("sentencepiece", "bytes", "cl100k")
SPLIT_KEYS = ("text", "path")
TEACHER_MIXING = ("mixed", "alternating")
GROWTH_FAMILIES = ("zero", "duplicate", "mask", "stack", "interleave", "middle", "perturb", "learned")
FAMILY_FIELDS = {
    "duplicate": ("split",),
    "mask": ("ramp_steps", "ramp"),
    "perturb": ("shrink",),
    "learned": ("tuning_steps", "tuning_learning_rate"),
}
RAMPS = ("linear", "cosine")
SPLITS = ("unequal", "equal")
MOMENTS = ("carry", "reset")
SCHEDULE_FIELDS = ("learning_rate", "final_learning_rate", "warmup_steps", "schedule", "decay_fraction")
RATE_POLICIES = ("continue", "rewarm", "rewind", "stage")
MESH_AXES = ("replica", "fsdp", "tensor")
STAGE_SIZES = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
SIZES = (*STAGE_SIZES, "vocab_size", "max_length")

# Endings of fields that decide how and where a run computes, not what: they may change when it goes on.
HOW_IT_RUNS = (
    *("mesh", "checkpoint", "log_every", "evaluate_every", "evaluation_rows", "data.directory", "data.workers"),
    *("certificate_rows", "certificate_float64_below", "certificate_tolerance", "sample_prompt", "sample_tokens"),
    *("model.attention", "model.remat", "model.scan_unroll", "microbatches", "peak_flops"),
)


class ConfigError(ValueError):
    """A setting that cannot be: the message names the field and what would do. The command line exits with 2."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One pre-norm decoder block; FLM, Tele-FLM, GPT-2 and Llama are settings of it."""

    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: one per query head
    head_dim: int = 32
    mlp_dim: int = 512
    vocab_size: int | None = None  # None: the tokenizer's
    vocab_multiple: int = 8  # rows of the table are padded to a multiple of this and of the tensor axis
    max_length: int = 256  # tokens
    norm: str = "layernorm"
    norm_eps: float = 1e-5  # of the first stage; width growth scales it, see RunConfig.stage_models
    activation: str = "gelu"
    position: str = "xpos"
    rope_theta: float = 10_000.0
    xpos_scale_base: float = 512.0
    rotary_dim: int | None = None  # head_dim of the first stage; None: head_dim. Growth keeps its frequencies
    rotary_repeat: bool = (
        False  # dimensions past rotary_dim: False, they do not turn; True, they repeat its frequencies
    )
    bias: bool = True
    tied_embedding: bool = True
    embedding_multiplier: float = 1.0
    output_multiplier: float = 1.0
    softmax_temperature: float = 1.0  # logits are divided by it
    dropout: float = 0.0
    init_std: float = 0.02
    base_embed_dim: int | None = None  # muP's base width (model/mup.py); None: standard parametrisation
    dtype: str = "float32"  # of the matrix multiplications; parameters are always float32
    attention: str = "plain"  # "fused": by the platform, model/attention.py
    remat: str = "none"
    scan_unroll: int = 1  # layers unrolled per iteration of the scan over layers

    @property
    def kv_heads(self) -> int:
        """Key/value heads, G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotated_dims(self) -> int:
        """Dimensions of a head whose frequencies are those of a head of just that size."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def width_multiplier(self) -> float:
        """m of muP: embed_dim over the base width; 1 in the standard parametrisation."""
        return 1.0 if self.base_embed_dim is None else self.embed_dim / self.base_embed_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table; those from vocab_size on never get a gradient and are never sampled."""
        assert self.vocab_size is not None, "vocab_size is filled in from the tokenizer before a model is built"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on float32 masters; weight decay on matrices only."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  # None: no clipping
    max_nonfinite_updates: int = 5  # in a row; then the run stops


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text and teacher signals come from and how they become rows of tokens."""

    sources: tuple[str, ...] = ("python_docs",)  # built-in names (data/corpus), files, folders or globs
    teachers: tuple[str, ...] = ()  # FreeLM's propositions (data/freelm.py): TEMPLATE:SOURCE or a .jsonl file
    mixture: str | None = None  # a registered seqio Task or Mixture, in place of sources and teachers
    task_module: str | None = None  # Python module to import that registers it; flmjax.data.tasks is always there
    weights: tuple[float, ...] | None = None  # share of samples per source, then per teacher; None: the mixture's
    # rates (its Tasks are in the order of their names), or by number of tokens
    vocabulary: str | None = None  # "sentencepiece" (trained here), "bytes", "cl100k" or the path of a SentencePiece
    # model; None: the mixture's own where it has one, else "sentencepiece"
    vocab_size: int = 4096  # pieces to train; read by "sentencepiece" alone
    end_id: int | None = None  # id that ends a document; None: the vocabulary's
    validation_fraction: float = 0.05  # of the documents, chosen by hash; a mixture's own splits come first
    split_by: str = "text"  # what is hashed: a document's text, or "path", its file within the source (parallel pages)
    end_of_document: bool = True  # append the end token to each document
    document_attention: bool = False  # True: attention and positions restart at every document
    true_mark: str = "\U0001f608"  # stands for "true" in a teacher's row; the paper does not say which one does
    false_mark: str = "\U0001f621"
    teacher_weight: float = 1.0  # of a teacher's target in the loss; that of text is 1
    teacher_mixing: str = "mixed"  # in every batch, or "alternating": every batch is wholly text or wholly teacher
    directory: str | None = None  # of the token files; None: WORKDIR/data
    workers: int | None = None  # processes that tokenise; None: one per core

    @property
    def num_sources(self) -> int | None:
        """Entries of `weights`; None: the mixture says."""
        return len(self.sources) + len(self.teachers) if self.mixture is None else None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one is None and takes the devices that remain."""

    replica: int = 1
    fsdp: int | None = None
    tensor: int = 1
    topology: str | None = None  # the machine that `flmjax plan` compiles for: a800:24x8, v5p:4x8x8 ...


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """The operator at a stage's start; that of the first stage is what `flmjax grow` uses."""

    family: str = "zero"  # growth/families.py says what each is and whether it is exact
    split: str = "unequal"  # of copies, "duplicate": equal ones stay equal for ever
    shrink: float = 0.4  # "perturb": what old matrices are multiplied by
    moments: str = "carry"  # "reset" forgets Adam's moments
    ramp_steps: int = 0  # "mask": updates from the mask's 0 to its 1
    ramp: str = "linear"  # its shape
    tuning_steps: int = 100  # "learned": updates of the growth matrices
    tuning_learning_rate: float = 1e-3  # Adam's, on the growth matrices
    learning_rate: str = "continue"  # or "rewarm", "rewind", or "stage": the stage has a schedule of its own
    rewarm_fraction: float = 0.01  # "rewarm": of the stage's steps
    new_warmup_fraction: float = 0.01  # of the stage's steps in which the new weights' rate rises; 0: none


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of the schedule. Sizes that are None are those of the stage before (or of the model)."""

    name: str = "stage"
    steps: int = 100  # optimizer updates
    batch_size: int = 8  # sequences per update, over all devices
    microbatches: int = 1  # the batch is computed in this many parts
    learning_rate: float = 1e-3  # this and the four below hold for the stages that continue the schedule, too
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    schedule: str = "cosine"
    decay_fraction: float = 0.2  # last part of the stage in which "wsd" decays
    weights: tuple[float, ...] | None = None  # mixture from this stage on; None: as before
    growth: GrowthConfig = GrowthConfig()
    num_layers: int | None = None
    embed_dim: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None

    @property
    def tuning_steps(self) -> int:
        """Batches that this stage's growth learns from before the first update."""
        return self.growth.tuning_steps if self.growth.family == "learned" else 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saves are asynchronous; a stage's end is always saved."""

    every: int = 100  # steps
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run: one model, its stages, and how to watch it."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every: int = 10  # steps
    evaluate_every: int = 100  # steps; a stage's end is always evaluated
    evaluation_rows: int = 64  # validation rows per evaluation
    certificate_rows: int = 4  # validation rows that a growth point compares logits on
    certificate_float64_below: int = 20_000_000  # parameters; larger models are not recomputed in float64
    certificate_tolerance: float = 2e-5  # of max |logit| (at least 1), in float32; a larger difference stops the run
    sample_prompt: str = "The "
    sample_tokens: int = 64
    peak_flops: float | None = None  # FLOP/s per device; None: table of known chips, else measured

    @property
    def stage_models(self) -> tuple[ModelConfig, ...]:
        """The model of every stage.

        Width growth keeps the function only if the norm's epsilon shrinks with it: eps' = eps d / d' (the new entries
        add nothing to the sum that the variance divides by d'), so later stages derive theirs from the first.
        """
        models = []
        multiple = math.lcm(self.model.vocab_multiple, self.mesh.tensor)
        model = dataclasses.replace(self.model, vocab_multiple=multiple)
        for i, stage in enumerate(self.stages):
            sizes = {name: getattr(stage, name) for name in STAGE_SIZES if getattr(stage, name) is not None}
            model = resize(model, stage.growth.family, **sizes) if i else dataclasses.replace(model, **sizes)
            models.append(model)
        return tuple(models)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_starts(self) -> tuple[int, ...]:
        """First step of every stage; a last entry holds the end of the run."""
        return tuple(sum(s.steps for s in self.stages[:i]) for i in range(len(self.stages) + 1))


def resize(model: ModelConfig, family: str = "zero", **sizes: Any) -> ModelConfig:
    """The configuration that `model` has after growth to `sizes`.

    Width growth divides the norm's epsilon. Growth of the heads keeps the old frequencies: new dimensions do not turn
    (which other libraries can express as partial rotary), or repeat the old frequencies if they are copies.
    """
    embed_dim = sizes.get("embed_dim", model.embed_dim)
    grown = dataclasses.replace(model, **sizes, norm_eps=model.norm_eps * model.embed_dim / embed_dim)
    if grown.head_dim == model.head_dim or model.position == "learned" or model.rotary_dim is not None:
        return grown
    return dataclasses.replace(grown, rotary_dim=model.head_dim, rotary_repeat=family == "duplicate")


def split_factor(old: ModelConfig, new: ModelConfig) -> int:
    """Parts that each group of query heads splits into, its key and value head copied for each; 1 for none.

    Raises:
        ConfigError: no splitting followed by adding leads from the old heads to the new ones.
    """
    heads_of_group, wanted = old.num_heads // old.kv_heads, new.num_heads // new.kv_heads
    for parts in range(1, heads_of_group + 1):
        if heads_of_group % parts == 0 and heads_of_group // parts <= wanted and old.kv_heads * parts <= new.kv_heads:
            return parts
    raise ConfigError(
        f"{old.num_heads} query heads in {old.kv_heads} groups cannot become {new.num_heads} in {new.kv_heads}: a "
        "group can gain heads, be joined by further groups, or split into equal parts that do"
    )


# ---- ml_collections -------------------------------------------------------------------------------------------------


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """A locked ConfigDict; fields that may be None take any literal, so that each can be set by flag."""
    hints = typing.get_type_hints(type(config))
    out = config_dict.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            value = tuple(to_config_dict(item) for item in value)
        elif types.NoneType in typing.get_args(hints[field.name]):  # object: the flag takes a literal, None too
            value = config_dict.FieldReference(value, field_type=object)
        out[field.name] = value
    return out.lock()


def from_config_dict(tree: Mapping[str, Any], cls: type = RunConfig, path: str = "config") -> Any:
    """Inverse of to_config_dict, for plain mappings too.

    Raises:
        ConfigError: for a key that is no field (with the nearest names) or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(f"{path} has no field '{key}'{nearest(key, fields)}")
        values[key] = _convert(value, hints[key], f"{path}.{key}")
    return cls(**values)


def to_json(config: RunConfig) -> dict[str, Any]:
    """Plain nested dictionary, as stored in a workdir; from_config_dict reads it back."""
    return dataclasses.asdict(config)


def differences(stored: Any, current: Any, path: str = "") -> list[str]:
    """`field: stored -> current` for every field that decides what a run computes and is not the same."""
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        keys = dict.fromkeys([*stored, *current])
        pairs = [(f"{path}.{key}".strip("."), stored.get(key), current.get(key)) for key in keys]
    elif isinstance(stored, list | tuple) and isinstance(current, list | tuple) and len(stored) == len(current):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(stored, current, strict=True))]
    else:
        return [] if stored == current else [f"{path}: {stored} -> {current}"]
    return [line for name, a, b in pairs if not name.endswith(HOW_IT_RUNS) for line in differences(a, b, name)]


def check_path(path: str) -> None:
    """Raise ConfigError with the nearest names unless `path`, as in `stages[0].steps`, names a field of a run."""
    hint: Any = RunConfig
    walked = "config"
    for word in path.split("."):
        name = word.split("[")[0]
        if not dataclasses.is_dataclass(hint):
            raise ConfigError(f"{walked} has no fields; '{name}' was asked for")
        hints = typing.get_type_hints(hint)
        if name not in hints:
            raise ConfigError(f"{walked} has no field '{name}'{nearest(name, hints)}")
        hint = typing.get_args(hints[name])[0] if "[" in word else hints[name]
        walked += f".{word}"


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """`; did you mean a, b?` or, without a near name, the whole list."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; choices: {', '.join(choices)}"


def _convert(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping | config_dict.ConfigDict):
            raise ConfigError(f"{path} must be a mapping of fields, not {value!r}")
        return from_config_dict(value, typing.cast(type, hint), path)
    args = typing.get_args(hint)
    if types.NoneType in args:
        return None if value is None else _convert(value, next(a for a in args if a is not types.NoneType), path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            value = (value,)
        return tuple(_convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} must be of type {hint.__name__}, not {value!r}")
    return value


# ---- rules ----------------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def validate(config: RunConfig) -> RunConfig:
    """Check every rule that one field or several must keep; returns the config.

    Raises:
        ConfigError: one line that names the field, its value and what would do.
    """
    _validate_model(config.model)
    _validate_optimizer(config.optimizer)
    _validate_data(config.data)
    apart = "data.document_attention" if config.data.document_attention else "data.teachers"
    _require(
        config.model.attention != "cudnn" or not (config.data.document_attention or config.data.teachers),
        f"model.attention='cudnn' cannot keep a row's documents apart, which {apart} asks for; take 'plain'",
    )
    _require(len(config.stages) > 0, "stages is empty; a run needs at least one stage")
    for i, stage in enumerate(config.stages):
        _validate_stage(stage, f"stages[{i}]", config.data.num_sources)
    _validate_schedule(config.stages)
    names = [stage.name for stage in config.stages]
    _require(len(set(names)) == len(names), f"stages have the same name: {', '.join(names)}")
    for i, (old, new) in enumerate(zip(config.stage_models, config.stage_models[1:], strict=False), start=1):
        _validate_growth(old, new, f"stages[{i}]")
    for i, model in enumerate(config.stage_models):
        _validate_model(model, f"stages[{i}]")
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
    _require(value in choices, f"{path}='{value}'{nearest(value, choices)}; choices: {', '.join(choices)}")


def _validate_model(m: ModelConfig, path: str = "model") -> None:
    for field, choices in (
        ("norm", NORMS),
        ("activation", ACTIVATIONS),
        ("position", POSITIONS),
        ("attention", ATTENTIONS),
        ("remat", REMATS),
        ("dtype", DTYPES),
    ):
        _choice(f"{path}.{field}", getattr(m, field), choices)
    for field in ("num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim", "max_length", "vocab_multiple"):
        _require(getattr(m, field) > 0, f"{path}.{field}={getattr(m, field)} must be positive")
    for field in ("rotary_dim", "base_embed_dim"):
        _require(
            getattr(m, field) is None or getattr(m, field) > 0, f"{path}.{field}={getattr(m, field)} must be positive"
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
    if m.position != "learned":
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
    _require(o.max_nonfinite_updates > 0, "optimizer.max_nonfinite_updates must be positive")


def _validate_weights(path: str, weights: tuple[float, ...] | None, num_sources: int | None) -> None:
    if weights is None:
        return
    _require(
        num_sources in (None, len(weights)), f"{path} has {len(weights)} entries for {num_sources} sources and teachers"
    )
    for weight in weights:
        _require(math.isfinite(weight) and weight > 0, f"{path}: {weight} must be positive")


def _validate_data(d: DataConfig) -> None:
    _require(len(d.sources) > 0, "data.sources is empty; name a built-in source, a file, a folder or a glob")
    names = (*d.sources, *d.teachers)
    _require(len(set(names)) == len(names), f"data.sources or data.teachers names one twice: {', '.join(names)}")
    _require(
        d.mixture is None or not d.teachers,
        f"data.teachers={d.teachers} is not read: data.mixture='{d.mixture}' says what the teachers are",
    )
    _require(
        d.task_module is None or d.mixture is not None,
        f"data.task_module='{d.task_module}' is not read without data.mixture: name the Task or Mixture it registers",
    )
    _validate_weights("data.weights", d.weights, d.num_sources)
    if d.vocabulary is not None and not d.vocabulary.endswith(".model"):
        _choice("data.vocabulary", d.vocabulary, VOCABULARIES)
    _require(d.vocab_size >= 300, f"data.vocab_size={d.vocab_size} must be at least 300 (256 bytes and a few pieces)")
    _require(d.end_id is None or d.end_id >= 0, f"data.end_id={d.end_id} must not be negative")
    _require(
        0.0 < d.validation_fraction < 0.5, f"data.validation_fraction={d.validation_fraction} must lie in (0, 0.5)"
    )
    _choice("data.split_by", d.split_by, SPLIT_KEYS)
    _choice("data.teacher_mixing", d.teacher_mixing, TEACHER_MIXING)
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
    _choice(f"{path}.schedule", s.schedule, SCHEDULES)
    _validate_operator(s, f"{path}.growth")
    _validate_weights(f"{path}.weights", s.weights, num_sources)


def _validate_operator(s: StageConfig, path: str) -> None:
    g = s.growth
    for field, choices in (
        ("family", GROWTH_FAMILIES),
        ("split", SPLITS),
        ("moments", MOMENTS),
        ("ramp", RAMPS),
        ("learning_rate", RATE_POLICIES),
    ):
        _choice(f"{path}.{field}", getattr(g, field), choices)
    for field in ("shrink", "rewarm_fraction", "new_warmup_fraction"):
        _require(0.0 <= getattr(g, field) <= 1.0, f"{path}.{field}={getattr(g, field)} must lie in [0, 1]")
    _require(g.tuning_steps >= 0, f"{path}.tuning_steps={g.tuning_steps} must not be negative")
    _require(
        math.isfinite(g.tuning_learning_rate) and g.tuning_learning_rate > 0,
        f"{path}.tuning_learning_rate={g.tuning_learning_rate} must be positive",
    )
    _require(
        g.family != "mask" or 0 < g.ramp_steps <= s.steps,
        f"{path}.ramp_steps={g.ramp_steps} must be 1 to the stage's steps={s.steps} for family 'mask'",
    )
    for family, fields in FAMILY_FIELDS.items():
        for field in fields if family != g.family else ():
            _require(
                getattr(g, field) == getattr(GrowthConfig(), field),
                f"{path}.{field}={getattr(g, field)} is not read by family '{g.family}', only by '{family}'",
            )


def _validate_schedule(stages: tuple[StageConfig, ...]) -> None:
    """A stage that continues a schedule may not bring one: it would be ignored."""
    default = StageConfig()
    _require(
        stages[0].growth.learning_rate == default.growth.learning_rate,
        f"stages[0].growth.learning_rate='{stages[0].growth.learning_rate}' is not read: the first stage has its own",
    )
    for i, stage in enumerate(stages[1:], start=1):
        for field in SCHEDULE_FIELDS if stage.growth.learning_rate != "stage" else ():
            _require(
                getattr(stage, field) == getattr(default, field),
                f"stages[{i}].{field}={getattr(stage, field)} is not read: stages[{i}].growth.learning_rate="
                f"'{stage.growth.learning_rate}' goes on with the schedule before it; 'stage' starts this one",
            )


def _validate_growth(old: ModelConfig, new: ModelConfig, path: str) -> None:
    for field in STAGE_SIZES:
        before, after = getattr(old, field), getattr(new, field)
        if field == "num_kv_heads":
            before, after = old.kv_heads, new.kv_heads
        _require(after >= before, f"{path}.{field}={after} is smaller than {before} of the stage before; stages grow")
    try:
        split_factor(old, new)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def validate_mesh(config: RunConfig, num_devices: int) -> MeshConfig:
    """Resolve and check the mesh for `num_devices`: every size divides, the product is the device count.

    Raises:
        ConfigError: naming the leaf's axis, the mesh axis and both numbers.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    free = [name for name, size in sizes.items() if size is None]
    _require(len(free) <= 1, f"mesh: only one of {', '.join(free)} can be None")
    fixed = math.prod(size for size in sizes.values() if size is not None)
    _require(fixed > 0, f"mesh: sizes must be positive: {sizes}")
    if free:
        _require(num_devices % fixed == 0, f"mesh: {fixed} (fixed axes) does not divide the {num_devices} devices")
        sizes[free[0]] = num_devices // fixed
    product = math.prod(sizes.values())
    _require(
        product == num_devices,
        f"mesh: {sizes} has {product} places for {num_devices} devices; an axis that is None takes what is left",
    )
    mesh = dataclasses.replace(config.mesh, **sizes)
    for i, (stage, model) in enumerate(zip(config.stages, config.stage_models, strict=True)):
        rows, data_axes = stage.batch_size // stage.microbatches, sizes["replica"] * sizes["fsdp"]
        _require(
            rows % data_axes == 0,
            f"stages[{i}]: batch_size / microbatches={rows} does not divide over mesh axis replica x fsdp={data_axes}; "
            f"{_legal_batches(stage, data_axes)}",
        )
        check_mesh(model, mesh, f"stages[{i}]")
    return mesh


def legal_microbatches(stage: StageConfig, data_axes: int) -> list[int]:
    """Numbers of parts of a stage's batch whose rows divide over the data axes, few first."""
    rows, rest = divmod(stage.batch_size, data_axes)
    return [] if rest else [n for n in range(1, rows + 1) if rows % n == 0]


def _legal_batches(stage: StageConfig, data_axes: int) -> str:
    """What would divide instead: other numbers of microbatches, or the next batches."""
    if counts := legal_microbatches(stage, data_axes):
        nearest_count = min(counts, key=lambda k: abs(k - stage.microbatches))
        return f"microbatches={nearest_count} would"
    unit = data_axes * stage.microbatches
    below = stage.batch_size // unit * unit
    return " or ".join(f"batch_size={size}" for size in (below, below + unit) if size) + " would"


def check_mesh(model: ModelConfig, mesh: MeshConfig, path: str) -> None:
    """Whether every size of a model divides over `mesh`, whose sizes are known.

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
