"""What a schedule costs: FLOPs, days, dollars, energy. Arithmetic on the configuration: no JAX."""

import dataclasses
import math
from collections.abc import Sequence

from flmjax.config import ConfigError, ModelConfig, RunConfig
from flmjax.model.flops import block_matrices, num_parameters

# Of the formula below: no layer, or every layer, is computed a second time for the backward pass.
PLAIN, RECOMPUTED = 72, 96
CARBON = 0.64  # kg CO2e a kWh: FLM-101B's 26 t over the 40.4 MWh of its 101,000 GPU hours at 400 W
AVAILABILITY = 0.924  # of FLM-101B's 21.54 days, the part that its FLOPs take at the speeds that it states


def training_flops(model: ModelConfig, tokens: float, factor: float = PLAIN) -> float:
    """FLOPs of training on `tokens` in rows of max_length, by the formula that FLM-101B's cost table uses.

    factor B s L h^2 (1 + s / 6h + V / 16Lh) of Narayanan et al. 2021 (arXiv 2104.04473, equation 2), attention in full;
    with 12 h^2 a layer written as the matrices that the layer has, so that it holds for SwiGLU and grouped heads too.

    Raises:
        ConfigError: without a vocabulary size.
    """
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size is None; FLOPs need the tokenizer's")
    attention = model.num_heads * model.head_dim * model.max_length / 6
    layers = model.num_layers * (block_matrices(model) / 12 + attention)
    return factor * tokens * (layers + model.vocab_size * model.embed_dim / 16)


@dataclasses.dataclass(frozen=True)
class StageCost:
    """One stage. steps: updates, `tuning_steps` that tune its growth among them. flops: as `training_flops` counts
    without recomputation."""

    name: str
    parameters: int
    steps: int
    tokens: float
    flops: float
    tuning_steps: int = 0


def stage_costs(config: RunConfig) -> list[StageCost]:
    """What each stage of a schedule takes.

    Raises:
        ConfigError: without a vocabulary size.
    """
    costs = []
    for i, (stage, model) in enumerate(zip(config.stages, config.stage_models, strict=True)):
        tuning = config.schedule[i].tuning_steps
        tokens = float((stage.steps + tuning) * stage.batch_size * model.max_length)
        flops = training_flops(model, tokens)
        costs.append(StageCost(stage.name, num_parameters(model), stage.steps + tuning, tokens, flops, tuning))
    return costs


def cost_from_scratch(config: RunConfig) -> float:
    """FLOPs of the last stage's model on the tokens of all stages."""
    return training_flops(config.stage_models[-1], sum(own.tokens for own in stage_costs(config)))


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device of a cluster takes.

    Attributes:
        devices: how many.
        dollars_per_hour: for one device; None where nobody said.
        watts: of one device; None where it is not published.
        carbon: kg CO2e a kWh.
    """

    devices: int
    dollars_per_hour: float | None = None
    watts: float | None = None
    carbon: float = CARBON


@dataclasses.dataclass(frozen=True)
class Bill:
    """What `days` on a machine come to; None where the machine does not say."""

    days: float
    device_hours: float
    dollars: float | None
    megawatt_hours: float | None
    tonnes_co2e: float | None


def bill(machine: Machine, days: float) -> Bill:
    """The bill of `days` on all devices."""
    hours = days * 24 * machine.devices
    energy = None if machine.watts is None else hours * machine.watts / 1e6
    return Bill(
        days=days,
        device_hours=hours,
        dollars=None if machine.dollars_per_hour is None else hours * machine.dollars_per_hour,
        megawatt_hours=energy,
        tonnes_co2e=None if energy is None else energy * machine.carbon,
    )


def days(flops: float, machine: Machine, flops_per_second: float, availability: float = 1.0) -> float:
    """Days that `flops` take at a speed of one device, of which a share of `availability` computes."""
    return flops / (machine.devices * flops_per_second * availability) / 86_400


# ---- what growth saves: two numbers that are not the same ------------------------------------------------------------


def saved_at_equal_tokens(stages: Sequence[float], scratch: float) -> float:
    """Share of a cost (FLOPs, days) that a schedule saves against its last model on all of its tokens.

    Arithmetic on the schedule; the larger model may reach another loss on these tokens.
    """
    return 1 - sum(stages) / scratch


def saved_at_equal_loss(grown: Sequence[tuple[float, float]], scratch: Sequence[tuple[float, float]]) -> float | None:
    """Share of a cost saved where both runs were measured: (cost, loss) in the order of training.

    The cost at which the run from scratch first reaches the grown run's last loss, on a straight line between its
    measurements; None if it never does, or nothing was measured.
    """
    if not grown or not scratch:
        return None
    cost, wanted = grown[-1]
    before: tuple[float, float] | None = None
    for at, loss in scratch:
        if loss <= wanted:
            if before is not None and before[1] > loss:
                at = before[0] + (at - before[0]) * (before[1] - wanted) / (before[1] - loss)
            return 1 - cost / at
        before = (at, loss)
    return None


# ---- what was published (arXiv 2309.03852) ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Published:
    """A stage of FLM-101B as its authors report it: tables 1 and 2. tflops: of one A800, no recomputation."""

    tflops: float
    days: float
    tokens: float


STAGES = {
    "16B": Published(162, 9.63, 245.37e9),
    "51B": Published(160, 5.37, 39.64e9),
    "101B": Published(165, 6.54, 26.54e9),
}
DEVICES, ZETTAFLOPS, DAYS, DAYS_FROM_SCRATCH, MEGAWATT_HOURS, TONNES_CO2E = 192, 52.76, 21.54, 76.74, 40.0, 26.0
DOLLARS_PER_HOUR = 1.0  # of an A800, our reading: $100k for 1.01e5 GPU hours


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model of the paper's table of costs: its shape as the formula takes it, and the published zettaFLOPs."""

    name: str
    layers: int
    embed_dim: int
    length: int
    vocab_size: int
    tokens: float
    zettaflops: float
    spread: float | None = None  # None: published without, every layer computed a second time

    @property
    def computed(self) -> tuple[float, float | None]:
        """(zettaFLOPs, spread) by the formula: the middle of its two factors and the distance to either."""
        model = ModelConfig(
            num_layers=self.layers,
            embed_dim=self.embed_dim,
            num_heads=self.embed_dim // 128,
            head_dim=128,
            mlp_dim=4 * self.embed_dim,
            vocab_size=self.vocab_size,
            max_length=self.length,
        )
        low, high = (training_flops(model, self.tokens, factor) / 1e21 for factor in (PLAIN, RECOMPUTED))
        return (high, None) if self.spread is None else ((low + high) / 2, (high - low) / 2)


PEERS = (
    Peer("GPT-3", 96, 12288, 2048, 50_257, 300e9, 376.41, 53.77),
    Peer("Llama-2-13B", 40, 5120, 4096, 32_000, 2e12, 201.37, 28.77),
    Peer("Llama-2-7B", 32, 4096, 4096, 32_000, 2e12, 106.60, 15.23),
    Peer("Llama-13B", 40, 5120, 2048, 32_000, 1e12, 94.81, 13.54),
    Peer("Llama-7B", 32, 4096, 2048, 32_000, 1e12, 49.54, 7.08),
    Peer("GLM-130B", 70, 12288, 2048, 150_528, 400e9, 421.60),
)


def published(costs: Sequence[StageCost]) -> list[Published | None]:
    """The paper's figures of the stages that are its own: equal name, tokens of training within a per cent."""
    found = [STAGES.get(cost.name) for cost in costs]
    return [
        f if f and math.isclose(f.tokens, c.tokens * (1 - c.tuning_steps / c.steps), rel_tol=0.01) else None
        for f, c in zip(found, costs, strict=True)
    ]
