"""Settings of the parts of a run, as frozen dataclasses; run.py joins them to those of a run."""

import dataclasses
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

from flmjax.config.families import FamilyTraits, family_traits
from flmjax.config.values import (
    INT32_MAX,
    MIN_VOCAB_SIZE,
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    expand_home,
    make_tuples,
)

AttentionBackend = Literal["plain", "fused", "cudnn", "splash"]
Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "dots", "full"]
GradientReduction = Literal["step", "microbatch"]

# Metadata of fields that decide how and where a run computes, but not its results: they may change when a run resumes.
EXECUTION = MappingProxyType({"role": "execution"})
# Metadata of fields that decide how numbers are represented: the old and new model of a growth may differ in them.
REPRESENTATION = MappingProxyType({"role": "representation"})

MESH_AXES = ("replica", "fsdp", "tensor")
STAGE_SIZES = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
SIZES = (*STAGE_SIZES, "vocab_size", "max_length")
# Fields of a grown model that follow from the sizes of both models: resize.
DERIVED = ("norm_eps", "rotary_dim", "rotary_repeat", "base_mlp_dim", "base_heads_dim")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Settings of a pre-norm decoder; FLM, Tele-FLM, GPT-2 and Llama are values of them."""

    num_layers: PositiveInt = 4
    embed_dim: PositiveInt = 128
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt | None = None  # None: one per query head
    head_dim: PositiveInt = 32
    mlp_dim: PositiveInt = 512
    vocab_size: Annotated[int, Range(2, INT32_MAX)] | None = None  # None: the tokenizer's
    # The rows of the embedding table are padded to a multiple of this number and of the tensor axis.
    vocab_multiple: PositiveInt = dataclasses.field(default=8, metadata=REPRESENTATION)
    max_length: PositiveInt = 256  # tokens
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: PositiveFloat = 1e-5  # of the first stage; width growth scales it, see RunConfig.schedule
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    position: Literal["xpos", "rope", "learned"] = "xpos"
    rope_theta: PositiveFloat = 10_000.0
    xpos_scale_base: PositiveFloat = 512.0
    rotary_dim: PositiveInt | None = None  # head_dim whose frequencies growth keeps; None: head_dim
    # Whether dimensions past rotary_dim repeat the frequencies before it; False: they do not turn.
    rotary_repeat: bool = False
    bias: bool = True
    tied_embedding: bool = True
    embedding_multiplier: PositiveFloat = 1.0
    output_multiplier: PositiveFloat = 1.0
    softmax_temperature: PositiveFloat = 1.0  # logits are divided by it
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    # Training minimises cross-entropy plus z_loss x logsumexp(logits)^2 a target (PaLM, section 5: 1e-4); 0: off.
    z_loss: NonNegativeFloat = 0.0
    init_std: PositiveFloat = 0.02
    base_embed_dim: PositiveInt | None = None  # muP's base width (model/mup.py); None: standard parametrisation
    # mlp_dim, and num_heads x head_dim, of muP's base model; None: in proportion to embed_dim. Growth fills them in.
    base_mlp_dim: PositiveFloat | None = None
    base_heads_dim: PositiveFloat | None = None
    # Dtype of the matrix multiplications; parameters are always float32.
    dtype: Dtype = dataclasses.field(default="float32", metadata=REPRESENTATION)
    # "fused": the backend that model/attention.py chooses for the platform.
    attention: AttentionBackend = dataclasses.field(default="plain", metadata=EXECUTION)
    remat: Remat = dataclasses.field(default="none", metadata=EXECUTION)
    # Layers unrolled per iteration of the scan over layers.
    scan_unroll: PositiveInt = dataclasses.field(default=1, metadata=EXECUTION)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def is_rotary(self) -> bool:
        """Whether positions rotate queries and keys (xPos, RoPE); learned positions are added to the embedding."""
        return self.position != "learned"

    @property
    def rotated_dims(self) -> int:
        """Head size K in the formula of the rotary frequencies: head_dim before it grew."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def width_multiplier(self) -> float:
        """Width multiplier m of muP: embed_dim / base_embed_dim; 1 in the standard parametrisation."""
        return 1.0 if self.base_embed_dim is None else self.embed_dim / self.base_embed_dim

    @property
    def mlp_multiplier(self) -> float:
        """Width multiplier of the MLP: mlp_dim / base_mlp_dim; width_multiplier if the MLP has no base of its own."""
        return self.width_multiplier if self.base_mlp_dim is None else self.mlp_dim / self.base_mlp_dim

    @property
    def heads_multiplier(self) -> float:
        """Width multiplier of attention: num_heads x head_dim / base_heads_dim; width_multiplier without that base."""
        dim = self.num_heads * self.head_dim
        return self.width_multiplier if self.base_heads_dim is None else dim / self.base_heads_dim

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding table; rows from vocab_size on never get a gradient and are never sampled."""
        assert self.vocab_size is not None, "vocab_size is filled in from the tokenizer before a model is built"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW. Parameters and moments are float32; weight decay acts on matrices only."""

    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat | None = 1.0  # None: no clipping
    max_skipped_updates: PositiveInt = 5  # in a row; then the run stops


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources of text and of teachers, and how they become sequences of tokens."""

    sources: tuple[str, ...] = ("python_docs",)  # built-in names (data/sources), files, folders or globs
    teachers: tuple[str, ...] = ()  # FreeLM's propositions (data/sources/freelm.py): TEMPLATE:SOURCE or a .jsonl file
    mixture: str | None = None  # a registered seqio Task or Mixture, in place of sources and teachers
    task_module: str | None = None  # Python module that registers data.mixture, such as data/sources/seqio_tasks.py
    # Share of samples per source, then per teacher; None: the rates of data.mixture (its Tasks in the order of their
    # names), or by number of tokens.
    mixture_weights: tuple[NonNegativeFloat, ...] | None = None
    # "sentencepiece" (trained on the sources), "bytes", "cl100k" or the path of a SentencePiece model; None: the
    # mixture's vocabulary if it has one, else "sentencepiece".
    vocabulary: str | None = None
    # Number of pieces to train; read by "sentencepiece" alone.
    vocab_size: Annotated[int, Range(MIN_VOCAB_SIZE, INT32_MAX)] = 4096
    end_id: NonNegativeInt | None = None  # id that ends a document; None: the vocabulary's
    # Share of documents, chosen by hash; splits that a mixture defines come first.
    validation_fraction: Annotated[float, Range(0, 0.5, open_low=True, open_high=True)] = 0.05
    # The hash is of a document's text, or of its "path" within the source (parallel pages stay together).
    split_by: Literal["text", "path"] = "text"
    end_of_document: bool = True  # append the end token to each document
    document_attention: bool = False  # True: attention and positions restart at every document
    # Mark for "true" in a sequence of a teacher; the paper does not say which mark is which.
    true_mark: str = "\U0001f608"
    false_mark: str = "\U0001f621"
    teacher_weight: PositiveFloat = 1.0  # loss weight of a target of a teacher; a target of text has 1
    # Text and teachers in every batch, or "alternating": every batch is only text or only teachers.
    teacher_mixing: Literal["mixed", "alternating"] = "mixed"
    # Samples that no update reads, such as those of a loss spike: ranges "FIRST:END" of their numbers, in rising order.
    # A run that goes on takes ranges of samples that it has not read yet.
    skip_samples: tuple[str, ...] = ()
    # Folder of the token files; None: WORKDIR/data.
    directory: str | None = dataclasses.field(default=None, metadata=EXECUTION)
    # Processes that tokenise; None: one per core.
    workers: PositiveInt | None = dataclasses.field(default=None, metadata=EXECUTION)

    def __post_init__(self) -> None:
        make_tuples(self, "sources", "teachers", "mixture_weights", "skip_samples")
        for name in ("sources", "teachers", "vocabulary", "directory"):
            object.__setattr__(self, name, expand_home(getattr(self, name)))

    @property
    def num_sources(self) -> int | None:
        """Number of entries of `mixture_weights`; None if data.mixture decides it."""
        return len(self.sources) + len(self.teachers) if self.mixture is None else None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; fsdp=None takes all remaining devices."""

    replica: PositiveInt = 1
    fsdp: PositiveInt | None = None
    tensor: PositiveInt = 1
    topology: str | None = None  # the machine that `flmjax plan` compiles for: a800:24x8, v5p:4x8x8*2 ...


@dataclasses.dataclass(frozen=True)
class StageMeshConfig:
    """Number of devices along each mesh axis in one stage. All None: the run's mesh.

    Otherwise replica and tensor default to the run's, and fsdp to all remaining devices.
    """

    replica: PositiveInt | None = None
    fsdp: PositiveInt | None = None
    tensor: PositiveInt | None = None

    def on(self, mesh: MeshConfig) -> MeshConfig:
        """The stage's mesh in a run whose mesh is `mesh`."""
        stated = {axis: getattr(self, axis) for axis in MESH_AXES if getattr(self, axis) is not None}
        return dataclasses.replace(mesh, **{"fsdp": None, **stated}) if stated else mesh


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """Settings of the growth at a stage's start; `flmjax grow` uses the settings of the first stage."""

    # A family of growth/families.py, which says whether it is exact; or "MODULE:NAME", a Family of another package.
    family: str = "zero"
    split: Literal["unequal", "equal"] = "unequal"  # "duplicate": shares of copies; copies with equal shares stay equal
    # "duplicate": least difference between the unequal shares of 2 copies of a unit.
    split_gap: Annotated[float, Range(0, 0.5, open_low=True, open_high=True)] = 0.4
    shrink: Share = 0.4  # "perturb": factor on old matrices
    moments: Literal["carry", "reset"] = "carry"  # "reset" forgets Adam's moments
    ramp_steps: NonNegativeInt = 0  # "mask": updates in which the growth mask opens from 0 to 1
    ramp: Literal["linear", "cosine"] = "linear"  # "mask": shape of the opening
    tuning_steps: NonNegativeInt = 100  # "learned": updates of the growth matrices
    tuning_learning_rate: PositiveFloat = 1e-3  # Adam's, on the growth matrices
    # The learning rate continues the schedule, warms up again, rewinds to its peak, or the stage has a new schedule.
    rate_policy: Literal["continue", "rewarm", "rewind", "stage"] = "continue"
    rewarm_fraction: Share = 0.01  # "rewarm": share of the stage's steps with warm-up
    new_warmup_fraction: Share = 0.01  # share of the stage's steps with warm-up of new parameters; 0: none

    @property
    def traits(self) -> FamilyTraits:
        """Properties of the family that the configuration needs."""
        return family_traits(self.family)


class ScheduleSettings(NamedTuple):
    """Schedule of the learning rate that a stage starts, with the defaults of the fields that the stage leaves None."""

    learning_rate: float = 1e-3  # peak
    final_learning_rate: float = 0.0
    initial_learning_rate: float = 0.0  # from which the warm-up rises
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.2  # "wsd": share of the steps, at the end, with decay


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Settings of one stage. A size of None is the size of the stage before, or of the model in the first stage."""

    name: str = "stage"
    steps: PositiveInt = 100  # optimizer updates
    batch_size: PositiveInt = 8  # sequences per update, over all devices
    # Number of parts that the batch is computed in, one after another.
    microbatches: PositiveInt = dataclasses.field(default=1, metadata=EXECUTION)
    # When gradients are summed over the replicas of the mesh: once a step, or in every microbatch.
    gradient_reduction: GradientReduction = dataclasses.field(default="step", metadata=EXECUTION)
    # How the stage is computed on the devices of the run; None: like the run (mesh, model.remat, model.attention).
    mesh: StageMeshConfig = dataclasses.field(default=StageMeshConfig(), metadata=EXECUTION)
    remat: Remat | None = dataclasses.field(default=None, metadata=EXECUTION)
    attention: AttentionBackend | None = dataclasses.field(default=None, metadata=EXECUTION)
    # Schedule of the learning rate, see ScheduleSettings. Stages that continue a schedule have None in these six.
    learning_rate: NonNegativeFloat | None = None
    final_learning_rate: NonNegativeFloat | None = None
    initial_learning_rate: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    schedule: Literal["constant", "cosine", "wsd"] | None = None
    decay_fraction: Annotated[float, Range(0, 1, open_low=True)] | None = None
    mixture_weights: tuple[NonNegativeFloat, ...] | None = None  # mixture from this stage on; None: no change
    growth: GrowthConfig = GrowthConfig()
    num_layers: PositiveInt | None = None
    embed_dim: PositiveInt | None = None
    mlp_dim: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None

    def __post_init__(self) -> None:
        make_tuples(self, "mixture_weights")

    @property
    def schedule_settings(self) -> ScheduleSettings:
        """The schedule that starts with this stage; the default stands for None."""
        values = {name: getattr(self, name) for name in ScheduleSettings._fields}
        return ScheduleSettings(**{name: value for name, value in values.items() if value is not None})

    def starts_schedule(self, index: int) -> bool:
        """Whether stage number `index` of a run, this one, starts a schedule of the learning rate."""
        return index == 0 or self.growth.rate_policy == "stage"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Settings of checkpoints, which are written in the background.

    The end of a stage is always saved, and so is the first update after a growth.
    """

    every: PositiveInt = 100  # steps
    # Minutes since the last checkpoint, beside `every`; read every log_every steps. None: no limit of time.
    every_minutes: PositiveFloat | None = None
    keep: PositiveInt = 3  # newest checkpoints
    # Steps; checkpoints at its multiples are kept for ever, beside the newest. A multiple of `every`. None: no such.
    keep_every: PositiveInt | None = None
    # Whether the last checkpoint of each stage is kept for ever.
    keep_stage_ends: bool = True


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Settings of the processes of a run on several hosts or devices; one process alone reads none of them."""

    # Time in which all processes must have met at the start: the nodes of a large job come up minutes apart.
    start_timeout_seconds: PositiveInt = 300
    # Time without a sign of life after which a process is lost, and the run ends. A process gives its sign from a
    # thread of its own, also while it compiles; a host that swaps or whose network pauses needs more than 10 seconds.
    heartbeat_seconds: PositiveInt = 100
    # Time that a process waits for the end of the others at the end of the run, while the first one writes the report.
    shutdown_seconds: PositiveInt = 300


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """How a run tells a loss spike, and what it does then.

    The loss of an update spikes if it lies more than `deviations` deviations above the median of the losses before it.
    Numbers are those of OLMo-core's SkipStepOptimizer, which skips at 6 standard deviations above the mean of 128
    losses; here a deviation is 1.4826 times the median absolute one, which spikes themselves do not widen. PaLM
    (arXiv:2204.02311, section 5.1) restarted about 100 steps before a spike and skipped 200 to 500 batches, those
    before and during the spike among them.
    """

    # "skip": the update is not made. "roll_back": the run goes back to an older checkpoint and leaves out the samples
    # from there to the spike and some more; after optimizer.max_skipped_updates updates that are not finite, too.
    # "stop": the run stops.
    action: Literal["none", "skip", "roll_back", "stop"] = "none"
    window: Annotated[int, Range(2, 4096)] = 128  # losses that an update is compared with; half of them are enough
    deviations: PositiveFloat = 6.0
    # "roll_back": least number of steps that the run goes back; a checkpoint as old as that must be kept.
    roll_back_steps: NonNegativeInt = 100
    skip_batches: NonNegativeInt = 100  # "roll_back": batches after the spike that are left out too
    max_roll_backs: PositiveInt = 10  # of the run; at the next spike it stops
