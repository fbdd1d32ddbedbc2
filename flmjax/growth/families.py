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
        finish: (leaf, grown parameter, fresh parameter, operator) -> parameter, after all dimensions have grown.
    """

    summary: str
    claim: str
    axes: Mapping[str, AxisRule]
    finish: Callable[[LeafAxes, jax.Array, jax.Array, GrowthConfig], jax.Array] | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the grown model is the same function."""
        return self.claim in (EXACT, EXACT_AT_FIRST)


FAMILIES: Mapping[str, Family] = {
    "zero": Family("new units are not read yet", EXACT, zero.AXES),
    "duplicate": Family("new units are copies that share what their source did", EXACT, duplicate.AXES),
    "mask": Family("new weights are fresh and fade in (MSG)", EXACT_AT_FIRST, masks.AXES),
    "stack": Family("the stack of layers again on top (G_stack); other axes as zero", INEXACT, depth.STACK),
    "interleave": Family("each layer again after itself; other axes as zero", INEXACT, depth.INTERLEAVE),
    "middle": Family("the middle layers again (MIDAS); other axes as zero", INEXACT, depth.MIDDLE),
    "perturb": Family("shrink, pad, perturb", INEXACT, perturb.AXES, perturb.perturb),
    "learned": Family("the growth matrices are tuned by gradient (LiGO)", TUNED, zero.AXES),
}
assert tuple(FAMILIES) == GROWTH_FAMILIES


def family_of(operator: GrowthConfig) -> Family:
    """The family that an operator names.

    Raises:
        ConfigError: unknown family, with the list.
    """
    if operator.family not in FAMILIES:
        raise ConfigError(f"growth family '{operator.family}'{nearest(operator.family, FAMILIES)}")
    return FAMILIES[operator.family]
