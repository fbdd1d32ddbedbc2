"""The table of growth families: the rule of each axis, and the claim about the grown model."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from flmjax.config import GROWTH_FAMILIES, ConfigError, FamilyTraits, GrowthConfig, nearest, outside_family
from flmjax.growth import depth, duplicate, masks, perturb, zero
from flmjax.growth.rules import AxisRule
from flmjax.sharding.axes import LeafAxes

EXACT = "exact"
EXACT_AT_FIRST = "exact until its growth mask opens"
INEXACT = "not exact"
TUNED = "not exact: tuned from an exact start"


class Family(NamedTuple):
    """One kind of growth.

    Attributes:
        summary: one line for tables and help.
        claim: EXACT, EXACT_AT_FIRST, TUNED or INEXACT.
        axes: the rule of each dimension by its name.
        finish: (leaf, grown parameter, fresh parameter, growth's config) -> parameter; after all dimensions have grown.
        traits: what the config must know of the family: the settings that it reads.
    """

    summary: str
    claim: str
    axes: Mapping[str, AxisRule]
    finish: Callable[[LeafAxes, jax.Array, jax.Array, GrowthConfig], jax.Array] | None = None
    traits: FamilyTraits = FamilyTraits()

    @property
    def is_exact(self) -> bool:
        """Whether the grown model computes the same function as the old model."""
        return self.claim in (EXACT, EXACT_AT_FIRST)

    @property
    def ramps(self) -> bool:
        """Whether a growth mask opens during the first updates (ramp.py)."""
        return "ramp_steps" in self.traits.settings

    @property
    def tunes(self) -> bool:
        """Whether the larger parameters are tuned on batches of text (learned.py)."""
        return "tuning_steps" in self.traits.settings

    @property
    def needs_training(self) -> str | None:
        """Reason why the family grows only within a run; None if it also grows a checkpoint between runs."""
        if self.ramps:
            return "its growth mask opens while the model trains"
        return "it learns from batches of text" if self.tunes else None


PAGES = {
    "zero": Family("new units are fresh, and the parameters that read them start at 0", EXACT, zero.AXES),
    "duplicate": Family("new units are copies that share the effect of their source", EXACT, duplicate.AXES),
    "mask": Family("new parameters are fresh and fade in (MSG)", EXACT_AT_FIRST, masks.AXES),
    "stack": Family("the old layers are repeated on top (G_stack); other axes as in zero", INEXACT, depth.STACK),
    "interleave": Family("each old layer is followed by its copies; other axes as in zero", INEXACT, depth.INTERLEAVE),
    "middle": Family(
        "the middle layers are followed by their copies (MIDAS); other axes as in zero", INEXACT, depth.MIDDLE
    ),
    "perturb": Family(
        "old matrices are shrunk, and fresh values are added everywhere", INEXACT, perturb.AXES, perturb.perturb
    ),
    "learned": Family("a linear map of the old parameters, learned by gradient (LiGO)", TUNED, zero.AXES),
}
FAMILIES: Mapping[str, Family] = {name: PAGES[name]._replace(traits=traits) for name, traits in GROWTH_FAMILIES.items()}


def family_of(config: GrowthConfig) -> Family:
    """The family that a growth's config names: a row of FAMILIES, or "MODULE:NAME" of another package.

    Raises:
        ConfigError: for an unknown family, with the nearest names or the list.
    """
    if ":" in config.family:
        family: Family = outside_family(config.family)
        return family
    if config.family not in FAMILIES:
        raise ConfigError(f"growth family '{config.family}'{nearest(config.family, FAMILIES)}")
    return FAMILIES[config.family]
