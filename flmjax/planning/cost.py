"""Cost of a schedule: FLOPs, days, dollars, energy. Arithmetic on the configuration: no JAX.

Notation (FLOPs is a count, FLOP/s a rate):
    N layers, D embed_dim, H heads, K head_dim, F mlp_dim, V true vocabulary, L max_length: of the model
    T       tokens of training
    M       parameters of one layer's matrices; 12 D^2 in GPT's shape (model/flops.py, block_matrices)
    factor  72: FLOPs without recomputation; 96: every layer is computed a second time for the backward pass
    C       FLOPs of training = factor T (N (M / 12 + H K L / 6) + V D / 16)

Example: one layer of GPT's shape, N = 1, D = H K = 4, F = 16, V = 10, L = 16, trained on T = 100 tokens without
recomputation: M = 12 x 4^2 = 192, and C = 72 x 100 x (192 / 12 + 4 x 16 / 6 + 10 x 4 / 16)
= 7,200 x (16 + 10.67 + 2.5) = 210,000 FLOPs.
"""

import dataclasses
import math
from collections.abc import Sequence

from flmjax.config import ConfigError, ModelConfig, RunConfig, Stage
from flmjax.hardware import Chip
from flmjax.model.flops import block_matrices, num_parameters

PLAIN, RECOMPUTED = 72, 96  # the two factors
CARBON = 0.64  # kg CO2e a kWh: FLM-101B's 26 t over the 40.4 MWh of its 101,000 GPU hours at 400 W
AVAILABILITY = 0.924  # share of FLM-101B's 21.54 days that its FLOPs take at the speeds that the paper states


def training_flops(model: ModelConfig, tokens: float, factor: float = PLAIN) -> float:
    """FLOPs of training on `tokens` tokens in sequences of max_length, by the formula of FLM-101B's cost table.

    The formula is factor B L N D^2 (1 + L / 6D + V / 16ND) of Narayanan et al. 2021 (arXiv 2104.04473, equation 2; B
    sequences), which counts attention in full. Its 12 D^2 a layer is written as the matrices of the layer, so that it
    holds for SwiGLU and grouped heads too.

    Raises:
        ConfigError: without a vocabulary size.
    """
    if model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is None until the data are prepared; state it, for example --config.model.vocab_size=4096"
        )
    attention = model.num_heads * model.head_dim * model.max_length / 6
    layers = model.num_layers * (block_matrices(model) / 12 + attention)
    return factor * tokens * (layers + model.vocab_size * model.embed_dim / 16)


@dataclasses.dataclass(frozen=True)
class StageCost:
    """Cost of one stage.

    Attributes:
        name: of the stage.
        parameters: of its model, padding of the vocabulary included.
        steps: updates, those that tune the growth included.
        tokens: of all these updates.
        flops: of all these updates, as `training_flops` counts without recomputation.
        tuning_steps: updates that tune the stage's growth.
    """

    name: str
    parameters: int
    steps: int
    tokens: float
    flops: float
    tuning_steps: int = 0


def stage_cost(stage: Stage) -> StageCost:
    """Cost of one stage of a schedule.

    Raises:
        ConfigError: without a vocabulary size.
    """
    steps = stage.config.steps + stage.tuning_steps
    tokens = float(steps * stage.config.batch_size * stage.model.max_length)
    flops = training_flops(stage.model, tokens)
    return StageCost(stage.name, num_parameters(stage.model), steps, tokens, flops, stage.tuning_steps)


def stage_costs(config: RunConfig) -> list[StageCost]:
    """Cost of every stage of a schedule; raises as stage_cost."""
    return [stage_cost(stage) for stage in config.schedule]


def tuning_words(costs: Sequence[StageCost]) -> list[str]:
    """A line for each stage that has updates which tune its growth."""
    return [
        f"{stage.name}: of {stage.steps:,} updates {stage.tuning_steps:,} tune its growth"
        for stage in costs
        if stage.tuning_steps
    ]


def cost_from_scratch(config: RunConfig) -> float:
    """FLOPs of the last stage's model on the tokens of all stages."""
    return training_flops(config.schedule[-1].model, sum(stage.tokens for stage in stage_costs(config)))


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices, their price and their power.

    Attributes:
        devices: how many.
        dollars_per_hour: price of one device; None: unknown.
        watts: power of one device; None: not published.
        carbon: kg CO2e a kWh.
    """

    devices: int
    dollars_per_hour: float | None = None
    watts: float | None = None
    carbon: float = CARBON


def machine_of(chip: Chip, devices: int, price: float | None) -> Machine:
    """`devices` chips at a price in dollars for a device-hour; None: the paper's for A800s, otherwise unknown."""
    if price is None and chip.kind == "A800":
        price = DOLLARS_PER_HOUR
    return Machine(devices, price, chip.watts)


@dataclasses.dataclass(frozen=True)
class Bill:
    """Cost of `days` days on a machine; None where the machine's price or power is unknown.

    Example: 2 days on 8 devices of 400 W at 1 dollar are 2 x 24 x 8 = 384 device-hours, 384 dollars,
    384 x 400 / 10^6 = 0.154 MWh and, at 0.64 kg a kWh, 0.0983 t CO2e.
    """

    days: float
    device_hours: float
    dollars: float | None
    megawatt_hours: float | None
    tonnes_co2e: float | None


def bill(machine: Machine, days: float) -> Bill:
    """The bill of `days` days on all devices of a machine."""
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
    """Days of a computation on a machine.

    Example: 10^18 FLOPs on 8 devices of 10^12 FLOP/s are 10^18 / (8 x 10^12) = 125,000 s = 1.45 days.

    Args:
        flops: FLOPs of the computation.
        flops_per_second: speed of one device in FLOP/s.
        availability: share of the time in which the devices compute.
    """
    return flops / (machine.devices * flops_per_second * availability) / 86_400


# ---- savings of growth: at equal tokens and at equal loss, which are two numbers -------------------------------------


def saved_at_equal_tokens(stages: Sequence[float], scratch: float) -> float:
    """Share of a cost (FLOPs, days) that a schedule saves against its last model on all of its tokens.

    This is arithmetic on the schedule; the larger model may reach another loss on these tokens. Example: stages that
    cost 1 and 2 and a last model that would cost 4 save 1 - 3 / 4 = 25 %.

    Args:
        stages: cost of each stage.
        scratch: cost of the last model on all tokens.
    """
    return 1 - sum(stages) / scratch


def saved_at_equal_loss(grown: Sequence[tuple[float, float]], scratch: Sequence[tuple[float, float]]) -> float | None:
    """Share of a cost (FLOPs, days) that a grown run saves against a run from scratch, both measured.

    The cost from scratch is that at which the run from scratch first reaches the grown run's last loss, on a straight
    line between its measurements.

    Args:
        grown, scratch: (cost, loss) in the order of training.

    Returns:
        The share; None if the run from scratch never reaches the loss, or nothing was measured.
    """
    if not grown or not scratch:
        return None
    cost, target = grown[-1]
    before: tuple[float, float] | None = None
    for at, loss in scratch:
        if loss <= target:
            if before is not None and before[1] > loss:
                at = before[0] + (at - before[0]) * (before[1] - target) / (before[1] - loss)
            return 1 - cost / at
        before = (at, loss)
    return None


# ---- figures that were published (arXiv 2309.03852) ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Published:
    """A stage of FLM-101B in tables 1 and 2 of the paper. tflops: model TFLOP/s of one A800, no recomputation."""

    tflops: float
    days: float
    tokens: float


STAGES = {
    "16B": Published(162, 9.63, 245.37e9),
    "51B": Published(160, 5.37, 39.64e9),
    "101B": Published(165, 6.54, 26.54e9),
}
DEVICES, ZETTAFLOPS, DAYS, DAYS_FROM_SCRATCH, MEGAWATT_HOURS, TONNES_CO2E = 192, 52.76, 21.54, 76.74, 40.0, 26.0
DOLLARS_PER_HOUR = 1.0  # price of an A800, our reading: $100k for 1.01e5 GPU hours


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model of the paper's table of costs: its shape in the formula, and the published zettaFLOPs.

    Attributes:
        spread: published half-distance between the zettaFLOPs of both factors; None: published without one, with every
            layer computed a second time.
    """

    name: str
    layers: int
    embed_dim: int
    length: int
    vocab_size: int
    tokens: float
    zettaflops: float
    spread: float | None = None

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
    """The paper's figures of each stage; None for a stage of another name or of tokens that differ by a per cent."""
    papers = [STAGES.get(stage.name) for stage in costs]
    return [
        paper
        if paper and math.isclose(paper.tokens, stage.tokens * (1 - stage.tuning_steps / stage.steps), rel_tol=0.01)
        else None
        for paper, stage in zip(papers, costs, strict=True)
    ]
