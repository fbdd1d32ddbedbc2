"""Traits of growth families: the part of a family that a config needs, known without JAX."""

import importlib
import os
import sys
from typing import Any, NamedTuple

from flmjax.config.errors import ConfigError, nearest


class FamilyTraits(NamedTuple):
    """Properties of a growth family that the configuration needs; growth/families.py has the family's rules.

    Attributes:
        settings: fields of GrowthConfig that this family reads and most families do not.
        repeats_frequencies: whether new dimensions of a head are copies, which have the frequencies of their sources.
    """

    settings: tuple[str, ...] = ()
    repeats_frequencies: bool = False


GROWTH_FAMILIES: dict[str, FamilyTraits] = {
    "zero": FamilyTraits(),
    "duplicate": FamilyTraits(("split", "split_gap"), repeats_frequencies=True),
    "mask": FamilyTraits(("ramp_steps", "ramp")),
    "stack": FamilyTraits(),
    "interleave": FamilyTraits(),
    "middle": FamilyTraits(),
    "perturb": FamilyTraits(("shrink",)),
    "learned": FamilyTraits(("tuning_steps", "tuning_learning_rate")),
}
# Settings whose meaning is that of one family: a family of another package cannot read them.
NOT_OUTSIDE = (*GROWTH_FAMILIES["mask"].settings, *GROWTH_FAMILIES["learned"].settings)


def family_traits(name: str) -> FamilyTraits:
    """Traits of the family `name`, a row of GROWTH_FAMILIES or "MODULE:NAME".

    Raises:
        ConfigError: for an unknown family, with the nearest names, or as outside_family.
    """
    if ":" in name:
        traits: FamilyTraits = outside_family(name).traits
        return traits
    if name not in GROWTH_FAMILIES:
        raise ConfigError(f"growth family '{name}'{nearest(name, GROWTH_FAMILIES)}; or 'MODULE:NAME'")
    return GROWTH_FAMILIES[name]


def outside_family(name: str) -> Any:
    """The growth.families.Family that "MODULE:NAME" names, imported from the path of Python or the current folder.

    Raises:
        ConfigError: for a module that cannot be imported, a name that it lacks, or an object that is no Family.
    """
    module_name, _, attribute = name.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # the path of a console script lacks the current folder
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"growth family '{name}': {module_name} cannot be imported: {reason}") from error
    finally:
        sys.path.remove(folder)
    names = vars(module)
    if attribute not in names:
        families = [other for other in names if isinstance(getattr(names[other], "traits", None), FamilyTraits)]
        raise ConfigError(f"growth family '{name}': {module_name} has no '{attribute}'{nearest(attribute, families)}")
    family, traits = names[attribute], getattr(names[attribute], "traits", None)
    if not isinstance(traits, FamilyTraits):
        raise ConfigError(f"growth family '{name}' is no flmjax.growth.families.Family but {type(family).__name__}")
    if wrong := [setting for setting in traits.settings if setting in NOT_OUTSIDE]:
        raise ConfigError(f"growth family '{name}' cannot read {', '.join(wrong)}: they belong to built-in families")
    return family
