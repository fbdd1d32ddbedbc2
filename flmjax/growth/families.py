"""All families: a rule for each axis, and what may be claimed of the result."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from flmjax.config import GROWTH_FAMILIES, ConfigError, GrowthConfig, nearest
from flmjax.growth import depth, duplicate, masks, perturb, zero
from flmjax.growth.rules import AxisRule
from flmjax.sharding.axes import LeafAxes

EXACT = "exact"
EXACT_AT_FIRST = "exact until its mask opens"
INEXACT = "not exact"
TUNED = "not exact: tuned from an exact start"


class Family(NamedTuple):
    """A way to grow.

    Attributes:
        summary: one line.
        claim: EXACT, EXACT_AT_FIRST, TUNED or INEXACT.
        axes: the rule of each dimension.
        finish: (leaf, grown parameter, fresh parameter, growth's config) -> parameter, after all dimensions have grown.
        ramps: whether a mask opens during the first updates (ramp.py).
        tunes: whether the larger parameters are tuned on batches of text (learned.py).
    """

    summary: str
    claim: str
    axes: Mapping[str, AxisRule]
    finish: Callable[[LeafAxes, jax.Array, jax.Array, GrowthConfig], jax.Array] | None = None
    ramps: bool = False
    tunes: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the grown model is the same function."""
        return self.claim in (EXACT, EXACT_AT_FIRST)

    @property
    def needs_training(self) -> str | None:
        """Why it grows within a run alone, in words; None: also between runs."""
        if self.ramps:
            return "its mask opens while the model trains"
        return "it learns from batches of text" if self.tunes else None


FAMILIES: Mapping[str, Family] = {
    "zero": Family("new units are not read yet", EXACT, zero.AXES),
    "duplicate": Family("new units are copies that share what their source did", EXACT, duplicate.AXES),
    "mask": Family("new weights are fresh and fade in (MSG)", EXACT_AT_FIRST, masks.AXES, ramps=True),
    "stack": Family("the stack of layers again on top (G_stack); other axes as zero", INEXACT, depth.STACK),
    "interleave": Family("each layer again after itself; other axes as zero", INEXACT, depth.INTERLEAVE),
    "middle": Family("the middle layers again (MIDAS); other axes as zero", INEXACT, depth.MIDDLE),
    "perturb": Family("shrink, pad, perturb", INEXACT, perturb.AXES, perturb.perturb),
    "learned": Family("the growth matrices are tuned by gradient (LiGO)", TUNED, zero.AXES, tunes=True),
}
assert FAMILIES.keys() == GROWTH_FAMILIES.keys()


def family_of(config: GrowthConfig) -> Family:
    """The family that a growth's config names.

    Raises:
        ConfigError: unknown family, with the list.
    """
    if config.family not in FAMILIES:
        raise ConfigError(f"growth family '{config.family}'{nearest(config.family, FAMILIES)}")
    return FAMILIES[config.family]
