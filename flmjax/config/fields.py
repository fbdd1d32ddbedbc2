"""Every setting of a run, as frozen dataclasses."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

AttentionBackend = Literal["plain", "fused", "cudnn", "splash"]
Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "dots", "full"]

# Metadata of fields that decide how and where a run computes, not what: they may change when a run resumes.
EXECUTION = MappingProxyType({"role": "execution"})
# Metadata of fields that decide how numbers are represented: old and new model of a growth may differ in them.
REPRESENTATION = MappingProxyType({"role": "representation"})

MESH_AXES = ("replica", "fsdp", "tensor")
STAGE_SIZES = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
SIZES = (*STAGE_SIZES, "vocab_size", "max_length")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis, all of them known: what validate_mesh makes of a MeshConfig."""

    replica: int
    fsdp: int
    tensor: int

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.replica * self.fsdp * self.tensor

    @property
    def data_shards(self) -> int:
        """Parts that the sequences of a batch divide into."""
        return self.replica * self.fsdp


class FamilyTraits(NamedTuple):
    """What the configuration must know of a growth family; growth/families.py has its rules.

    Attributes:
        settings: fields of GrowthConfig that only some families read, and this one does.
        repeats_frequencies: whether new dimensions of a head are copies, which turn as their sources do.
    """

    settings: tuple[str, ...] = ()
    repeats_frequencies: bool = False


GROWTH_FAMILIES: dict[str, FamilyTraits] = {
    "zero": FamilyTraits(),
    "duplicate": FamilyTraits(("split",), repeats_frequencies=True),
    "mask": FamilyTraits(("ramp_steps", "ramp")),
    "stack": FamilyTraits(),
    "interleave": FamilyTraits(),
    "middle": FamilyTraits(),
    "perturb": FamilyTraits(("shrink",)),
    "learned": FamilyTraits(("tuning_steps", "tuning_learning_rate")),
}


class ConfigError(ValueError):
    """A setting that cannot be: the message names the field and what would do. The command line exits with 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean a, b?` or, without a near name, the whole list."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; choices: {', '.join(choices)}"


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
    # Rows of the table are padded to a multiple of this and of the tensor axis.
    vocab_multiple: int = dataclasses.field(default=8, metadata=REPRESENTATION)
    max_length: int = 256  # tokens
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5  # of the first stage; width growth scales it, see RunConfig.stage_models
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    position: Literal["xpos", "rope", "learned"] = "xpos"
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
    # Of the matrix multiplications; parameters are always float32.
    dtype: Dtype = dataclasses.field(default="float32", metadata=REPRESENTATION)
    # "fused": the backend that model/attention.py chooses for the platform.
    attention: AttentionBackend = dataclasses.field(default="plain", metadata=EXECUTION)
    remat: Remat = dataclasses.field(default="none", metadata=EXECUTION)
    # Layers unrolled per iteration of the scan over layers.
    scan_unroll: int = dataclasses.field(default=1, metadata=EXECUTION)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def is_rotary(self) -> bool:
        """Whether positions turn queries and keys (xPos, RoPE); learned positions are added to the embedding."""
        return self.position != "learned"

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
    max_skipped_updates: int = 5  # in a row; then the run stops


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text and teacher signals come from and how they become rows of tokens."""

    sources: tuple[str, ...] = ("python_docs",)  # built-in names (data/sources), files, folders or globs
    teachers: tuple[str, ...] = ()  # FreeLM's propositions (data/sources/freelm.py): TEMPLATE:SOURCE or a .jsonl file
    mixture: str | None = None  # a registered seqio Task or Mixture, in place of sources and teachers
    task_module: str | None = None  # Python module to import that registers it, as data/sources/seqio_tasks.py does
    # Share of samples per source, then per teacher; None: the rates of data.mixture (its Tasks in the order of their
    # names), or by number of tokens.
    mixture_weights: tuple[float, ...] | None = None
    vocabulary: str | None = None  # "sentencepiece" (trained here), "bytes", "cl100k" or the path of a SentencePiece
    # model; None: the mixture's own where it has one, else "sentencepiece"
    vocab_size: int = 4096  # pieces to train; read by "sentencepiece" alone
    end_id: int | None = None  # id that ends a document; None: the vocabulary's
    validation_fraction: float = 0.05  # of the documents, chosen by hash; a mixture's own splits come first
    split_by: Literal["text", "path"] = (
        "text"  # what is hashed: a document's text, or "path", its file within the source (parallel pages)
    )
    end_of_document: bool = True  # append the end token to each document
    document_attention: bool = False  # True: attention and positions restart at every document
    true_mark: str = "\U0001f608"  # stands for "true" in a teacher's row; the paper does not say which one does
    false_mark: str = "\U0001f621"
    teacher_weight: float = 1.0  # of a teacher's target in the loss; that of text is 1
    teacher_mixing: Literal["mixed", "alternating"] = (
        "mixed"  # in every batch, or "alternating": every batch is wholly text or wholly teacher
    )
    # Of the token files; None: WORKDIR/data.
    directory: str | None = dataclasses.field(default=None, metadata=EXECUTION)
    # Processes that tokenise; None: one per core.
    workers: int | None = dataclasses.field(default=None, metadata=EXECUTION)

    @property
    def num_sources(self) -> int | None:
        """Entries of `mixture_weights`; None: the mixture says."""
        return len(self.sources) + len(self.teachers) if self.mixture is None else None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; an fsdp of None takes the devices that remain."""

    replica: int = 1
    fsdp: int | None = None
    tensor: int = 1
    topology: str | None = None  # the machine that `flmjax plan` compiles for: a800:24x8, v5p:4x8x8 ...


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """The operator at a stage's start; that of the first stage is what `flmjax grow` uses."""

    family: str = "zero"  # growth/families.py says what each is and whether it is exact
    split: Literal["unequal", "equal"] = "unequal"  # of copies, "duplicate": equal ones stay equal for ever
    shrink: float = 0.4  # "perturb": what old matrices are multiplied by
    moments: Literal["carry", "reset"] = "carry"  # "reset" forgets Adam's moments
    ramp_steps: int = 0  # "mask": updates from the mask's 0 to its 1
    ramp: Literal["linear", "cosine"] = "linear"  # its shape
    tuning_steps: int = 100  # "learned": updates of the growth matrices
    tuning_learning_rate: float = 1e-3  # Adam's, on the growth matrices
    rate_policy: Literal["continue", "rewarm", "rewind", "stage"] = (
        "continue"  # or "rewarm", "rewind", or "stage": the stage has a schedule of its own
    )
    rewarm_fraction: float = 0.01  # "rewarm": of the stage's steps
    new_warmup_fraction: float = 0.01  # of the stage's steps in which the new weights' rate rises; 0: none

    @property
    def traits(self) -> FamilyTraits:
        """What the configuration knows of the family."""
        return GROWTH_FAMILIES[self.family]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of the schedule. Sizes that are None are those of the stage before (or of the model)."""

    name: str = "stage"
    steps: int = 100  # optimizer updates
    batch_size: int = 8  # sequences per update, over all devices
    # The batch is computed in this many parts.
    microbatches: int = dataclasses.field(default=1, metadata=EXECUTION)
    learning_rate: float = 1e-3  # this and the four below hold for the stages that continue the schedule, too
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.2  # last part of the stage in which "wsd" decays
    mixture_weights: tuple[float, ...] | None = None  # mixture from this stage on; None: as before
    growth: GrowthConfig = GrowthConfig()
    num_layers: int | None = None
    embed_dim: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None


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
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=EXECUTION)
    checkpoint: CheckpointConfig = dataclasses.field(default=CheckpointConfig(), metadata=EXECUTION)
    # Steps between lines of training metrics.
    log_every: int = dataclasses.field(default=10, metadata=EXECUTION)
    # Steps between evaluations; a stage's end is always evaluated.
    evaluate_every: int = dataclasses.field(default=100, metadata=EXECUTION)
    # Validation rows per evaluation.
    evaluation_rows: int = dataclasses.field(default=64, metadata=EXECUTION)
    # Validation rows that a growth point compares logits on.
    certificate_rows: int = dataclasses.field(default=4, metadata=EXECUTION)
    # Parameters; larger models are not recomputed in float64.
    certificate_float64_below: int = dataclasses.field(default=20_000_000, metadata=EXECUTION)
    # Of max |logit| (at least 1), in float32; a larger difference stops the run.
    certificate_tolerance: float = dataclasses.field(default=2e-5, metadata=EXECUTION)
    sample_prompt: str = dataclasses.field(default="The ", metadata=EXECUTION)
    sample_tokens: int = dataclasses.field(default=64, metadata=EXECUTION)
    # FLOP/s per device; None: table of known chips, else measured.
    peak_flops: float | None = dataclasses.field(default=None, metadata=EXECUTION)

    @functools.cached_property
    def schedule(self) -> "tuple[Stage, ...]":
        """The stages in order, each with its model, its layout and its steps.

        Width growth keeps the function only if the norm's epsilon shrinks with it: eps' = eps d / d' (the new entries
        add nothing to the sum that the variance divides by d'), so later stages derive theirs from the first.
        """
        schedule: list[Stage] = []
        multiple = math.lcm(self.model.vocab_multiple, self.mesh.tensor)
        model = dataclasses.replace(self.model, vocab_multiple=multiple)
        for index, stage in enumerate(self.stages):
            sizes = {name: getattr(stage, name) for name in STAGE_SIZES if getattr(stage, name) is not None}
            model = resize(model, stage.growth.family, **sizes) if index else dataclasses.replace(model, **sizes)
            previous = schedule[-1] if schedule else None
            start = previous.end if previous else 0
            layout = Layout(self.mesh, model.remat, model.attention, stage.microbatches)
            schedule.append(Stage(index, stage, model, layout, start, start + stage.steps, previous))
        return tuple(schedule)

    @property
    def stage_models(self) -> tuple[ModelConfig, ...]:
        """The model of every stage."""
        return tuple(stage.model for stage in self.schedule)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_starts(self) -> tuple[int, ...]:
        """First step of every stage; a last entry holds the end of the run."""
        return tuple(sum(s.steps for s in self.stages[:i]) for i in range(len(self.stages) + 1))


class Layout(NamedTuple):
    """How a stage lies on the devices: decides speed and memory, not results."""

    mesh: MeshConfig
    remat: Remat
    attention: AttentionBackend
    microbatches: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run's schedule, with what follows from the stages before it.

    Attributes:
        index: number of stages before it.
        config: the stage's settings.
        model: the configuration of its model.
        layout: how it lies on the devices.
        start, end: optimizer updates of the run before the stage, and at its end.
        previous: the stage that it grows from; None for the first.
    """

    index: int
    config: StageConfig
    model: ModelConfig
    layout: Layout
    start: int
    end: int
    previous: "Stage | None" = None

    @property
    def name(self) -> str:
        """The stage's name in messages and metrics."""
        return self.config.name

    @property
    def ramp(self) -> range:
        """Updates during which the mask of this stage's growth opens; empty without a mask."""
        return range(self.start, self.start + self.config.growth.ramp_steps) if self._reads("ramp_steps") else range(0)

    @property
    def tuning_steps(self) -> int:
        """Batches that this stage's growth learns from before the first update."""
        return self.config.growth.tuning_steps if self._reads("tuning_steps") else 0

    def _reads(self, setting: str) -> bool:
        return self.previous is not None and setting in self.config.growth.traits.settings


def resize(model: ModelConfig, family: str = "zero", **sizes: Any) -> ModelConfig:
    """The configuration that `model` has after growth to `sizes`.

    Width growth divides the norm's epsilon. Growth of the heads keeps the old frequencies: new dimensions do not turn
    (which other libraries can express as partial rotary), or repeat the old frequencies if they are copies.
    """
    embed_dim = sizes.get("embed_dim", model.embed_dim)
    grown = dataclasses.replace(model, **sizes, norm_eps=model.norm_eps * model.embed_dim / embed_dim)
    if grown.head_dim == model.head_dim or not model.is_rotary or model.rotary_dim is not None:
        return grown
    return dataclasses.replace(
        grown, rotary_dim=model.head_dim, rotary_repeat=GROWTH_FAMILIES[family].repeats_frequencies
    )


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
