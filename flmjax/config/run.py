"""Settings of a run, and the stages that follow from them, each with its model, its layout and its steps."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

from flmjax.config.families import family_traits
from flmjax.config.fields import (
    EXECUTION,
    STAGE_SIZES,
    AttentionBackend,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    GradientReduction,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Remat,
    SpikeConfig,
    StageConfig,
    StageMeshConfig,
)
from flmjax.config.shapes import MeshShape
from flmjax.config.values import Count, NonNegativeInt, PositiveFloat, PositiveInt, Seed, expand_home, make_tuples


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run: model, stages, optimizer, data, devices, and how often to report."""

    seed: Seed = 0
    model: ModelConfig = ModelConfig()
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=EXECUTION)
    checkpoint: CheckpointConfig = dataclasses.field(default=CheckpointConfig(), metadata=EXECUTION)
    distributed: DistributedConfig = dataclasses.field(default=DistributedConfig(), metadata=EXECUTION)
    # Time since the start of the process after which the run saves and ends with exit status 75; the same command goes
    # on. For machines that are lent for some hours. None: no limit.
    stop_after_seconds: PositiveFloat | None = dataclasses.field(default=None, metadata=EXECUTION)
    # Acts on the updates from then on where it changes when a run goes on.
    spike: SpikeConfig = dataclasses.field(default=SpikeConfig(), metadata=EXECUTION)
    # Whether the compilers of GPUs and TPUs are told to run exchanges between devices behind computation.
    overlap_collectives: bool = dataclasses.field(default=True, metadata=EXECUTION)
    # Whether updates on GPUs give the same bits in every execution, which makes them slower; on CPUs they always do.
    deterministic: bool = dataclasses.field(default=False, metadata=EXECUTION)
    # Steps between lines of training metrics.
    log_every: PositiveInt = dataclasses.field(default=10, metadata=EXECUTION)
    # Steps between lines of the norms of gradients and parameters, for every kind of leaf; None: no such lines.
    norms_every: PositiveInt | None = dataclasses.field(default=None, metadata=EXECUTION)
    # Steps between evaluations; the end of a stage is always evaluated.
    evaluate_every: PositiveInt = dataclasses.field(default=100, metadata=EXECUTION)
    # Validation sequences per evaluation.
    evaluation_rows: PositiveInt = dataclasses.field(default=64, metadata=EXECUTION)
    # Validation sequences for the certificate of a growth.
    certificate_rows: PositiveInt = dataclasses.field(default=4, metadata=EXECUTION)
    # Number of parameters; certificates of larger models have no comparison in float64.
    certificate_float64_below: Count = dataclasses.field(default=20_000_000, metadata=EXECUTION)
    # Largest difference of logits in multiples of the old model's own rounding; a larger one stops the run. Exact
    # growths make 0.2 to 1.6 (growth/certificate.py).
    certificate_roundings: PositiveFloat = dataclasses.field(default=8.0, metadata=EXECUTION)
    sample_prompt: str = dataclasses.field(default="The ", metadata=EXECUTION)
    sample_tokens: NonNegativeInt = dataclasses.field(default=64, metadata=EXECUTION)
    # Folder of compiled programs, which runs may share; None: JAX_COMPILATION_CACHE_DIR, else WORKDIR/compile_cache.
    compile_cache: str | None = dataclasses.field(default=None, metadata=EXECUTION)
    # Peak FLOP/s per device; None: from the table of known chips, else measured.
    peak_flops: PositiveFloat | None = dataclasses.field(default=None, metadata=EXECUTION)

    def __post_init__(self) -> None:
        make_tuples(self, "stages")
        object.__setattr__(self, "compile_cache", expand_home(self.compile_cache))

    @functools.cached_property
    def schedule(self) -> "tuple[Stage, ...]":
        """The stages in order, each with its model, its layout and its steps.

        Width growth keeps the function only if the norm's epsilon shrinks with it: eps' = eps d / d' (the new entries
        add nothing to the sum that the variance divides by d'), so later stages derive their epsilon from the first.
        """
        schedule: list[Stage] = []
        meshes = [stage.mesh.on(self.mesh) for stage in self.stages]
        # One padding for all stages: the vocabulary's rows stay the same where the tensor axis changes.
        multiple = math.lcm(self.model.vocab_multiple, *(mesh.tensor for mesh in meshes))
        model = dataclasses.replace(self.model, vocab_multiple=multiple)
        for index, stage in enumerate(self.stages):
            sizes = {name: getattr(stage, name) for name in STAGE_SIZES if getattr(stage, name) is not None}
            model = resize(model, stage.growth.family, **sizes) if index else dataclasses.replace(model, **sizes)
            previous = schedule[-1] if schedule else None
            start = previous.end if previous else 0
            layout = Layout(
                meshes[index],
                stage.remat or self.model.remat,
                stage.attention or self.model.attention,
                stage.microbatches,
                self.overlap_collectives,
                self.deterministic,
                stage.gradient_reduction,
                self.norms_every is not None,
            )
            model = dataclasses.replace(model, remat=layout.remat, attention=layout.attention)
            schedule.append(Stage(index, stage, model, layout, start, start + stage.steps, previous))
        return tuple(schedule)

    @property
    def stage_models(self) -> tuple[ModelConfig, ...]:
        """The model of every stage."""
        return tuple(stage.model for stage in self.schedule)

    def stage_at(self, step: int) -> "Stage":
        """The stage that update number `step` of the run belongs to; the last one after the end of the schedule."""
        return next((stage for stage in self.schedule if step <= stage.end), self.schedule[-1])

    @property
    def total_steps(self) -> int:
        """Number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def with_layout(stage: StageConfig, mesh: MeshShape, remat: Remat, microbatches: int) -> StageConfig:
    """The stage's settings with this mesh, remat and number of microbatches."""
    return dataclasses.replace(
        stage, mesh=StageMeshConfig(**dataclasses.asdict(mesh)), remat=remat, microbatches=microbatches
    )


class Layout(NamedTuple):
    """How a stage is computed on the devices: decides speed and memory, but not results."""

    mesh: MeshConfig
    remat: Remat
    attention: AttentionBackend
    microbatches: int
    overlap_collectives: bool = True
    deterministic: bool = False
    gradient_reduction: GradientReduction = "step"
    norms: bool = False  # whether the training step returns the norms of the gradients of every leaf


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run's schedule, with the model, layout and steps that follow from the stages before it.

    Attributes:
        index: number of stages before it.
        config: the stage's settings.
        model: the configuration of its model.
        layout: how the stage is computed on the devices.
        start, end: number of updates of the run before the stage, and at its end.
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

    def setting_of(self, name: Literal["mesh", "remat", "attention"]) -> str:
        """Path of the setting that decides a part of the layout: the stage's own, or the run's."""
        if getattr(self.config, name) != getattr(StageConfig(), name):
            return f"stages[{self.index}].{name}"
        return name if name == "mesh" else f"model.{name}"

    @property
    def ramp(self) -> range:
        """Updates of the run during which the stage's growth mask opens; empty without a mask."""
        return range(self.start, self.start + self.config.growth.ramp_steps) if self._reads("ramp_steps") else range(0)

    @property
    def tuning_steps(self) -> int:
        """Number of batches that a learned growth reads before the stage's first update; 0 for other families."""
        return self.config.growth.tuning_steps if self._reads("tuning_steps") else 0

    def updates_before(self, step: int) -> int:
        """Updates of the stage among the first `step` of the run, and those that its growth learns from."""
        return min(max(step, self.start), self.end) - self.start + self.tuning_steps

    def samples_before(self, step: int) -> int:
        """Samples (sequences) that the first `step` updates of the run read, and the growths that learn."""
        before = self.previous.samples_before(self.start) if self.previous else 0
        return before + self.updates_before(step) * self.config.batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens of samples_before; all stages of a run have one length."""
        return self.samples_before(step) * self.model.max_length

    def _reads(self, setting: str) -> bool:
        return self.previous is not None and setting in self.config.growth.traits.settings


def resize(model: ModelConfig, family: str = "zero", **sizes: Any) -> ModelConfig:
    """The configuration of `model` after growth to `sizes`.

    Width growth scales the norm's epsilon by old / new embed_dim. Under muP an MLP or heads that do not grow in
    proportion to embed_dim keep the old model's base. Growth of head_dim keeps the old frequencies: new dimensions do
    not turn (partial rotary in other libraries), or repeat the old frequencies if they are copies.
    """
    embed_dim = sizes.get("embed_dim", model.embed_dim)
    grown = dataclasses.replace(model, **sizes, norm_eps=model.norm_eps * model.embed_dim / embed_dim)
    if model.base_embed_dim is not None:
        heads_dim, new_heads_dim = (c.num_heads * c.head_dim for c in (model, grown))
        if model.base_mlp_dim is None and grown.mlp_dim * model.embed_dim != model.mlp_dim * embed_dim:
            grown = dataclasses.replace(grown, base_mlp_dim=model.mlp_dim / model.width_multiplier)
        if model.base_heads_dim is None and new_heads_dim * model.embed_dim != heads_dim * embed_dim:
            grown = dataclasses.replace(grown, base_heads_dim=heads_dim / model.width_multiplier)
    if grown.head_dim == model.head_dim or not model.is_rotary or model.rotary_dim is not None:
        return grown
    return dataclasses.replace(
        grown, rotary_dim=model.head_dim, rotary_repeat=family_traits(family).repeats_frequencies
    )
