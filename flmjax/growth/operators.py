"""What happens to a leaf along one axis that grows: one function per axis and family.

A rule looks only at how the leaf meets the axis (model.axes), so a new layer type needs no new rule.
Source of the zero family: exact at any size, from Net2Net's zero fan-out, LEMON's mean fill for LayerNorm, and the
norm corrections gain sqrt(d/d'), epsilon d/d' (the epsilon lives in the config: config.resize).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flmjax.config import ConfigError, ModelConfig, nearest
from flmjax.model.axes import LeafAxes


class GrowthError(ValueError):
    """A growth that cannot be, or that is not what it claims; names the leaf or the size."""


class Rule(NamedTuple):
    """New entries of a leaf along an axis, and what its old ones are multiplied by.

    Attributes:
        fill: "zero"; "fresh", as a new model is initialised; "mean" of the old entries along the axis.
        factor: on the old entries. Gradients shrink by it, so that moments divide by it and its square.
    """

    fill: str
    factor: float = 1.0


AxisRule = Callable[[LeafAxes, ModelConfig, ModelConfig], Rule]


def zero_embed(leaf: LeafAxes, old: ModelConfig, new: ModelConfig) -> Rule:
    """Residual width. The norm must see the old statistics and give the new entries 0.

    LayerNorm: a new entry that equals the mean of the old ones leaves the mean and the sum of squared deviations as
    they are. RMSNorm: a new entry of 0 leaves the sum of squares. Either way the variance shrinks by d/d', which the
    gain and the epsilon take back, and the normalised new entries are 0: what reads them is free, and their gains too.
    """
    ratio = old.embed_dim / new.embed_dim
    if leaf.role("embed") == "write":
        return Rule("mean" if new.norm == "layernorm" else "zero")
    if leaf.role("embed") == "scale":
        return Rule("fresh", factor=math.sqrt(ratio))
    return {"read": Rule("fresh"), "shift": Rule("zero")}[str(leaf.role("embed"))]


def zero_hidden(axis: str) -> AxisRule:
    """MLP units and heads: what makes them is fresh, what reads them is 0."""

    def rule(leaf: LeafAxes, old: ModelConfig, new: ModelConfig) -> Rule:
        return {"write": Rule("fresh"), "read": Rule("zero")}[str(leaf.role(axis))]

    return rule


def zero_layers(leaf: LeafAxes, old: ModelConfig, new: ModelConfig) -> Rule:
    """Depth, at the top: a new block is fresh but for what writes to the residual stream, which is 0 (identity)."""
    return Rule("zero" if leaf.role("embed") == "write" else "fresh")


FAMILIES: Mapping[str, Mapping[str, AxisRule]] = {
    "zero": {
        "embed": zero_embed,
        "mlp": zero_hidden("mlp"),
        "heads": zero_hidden("heads"),
        "kv_heads": zero_hidden("kv_heads"),
        "layers": zero_layers,
    },
}


def rule_for(
    path: str, leaf: LeafAxes, axis: str, family: str, old: ModelConfig, new: ModelConfig, shapes: str
) -> Rule:
    """The rule of `family` for a leaf along `axis`.

    Raises:
        ConfigError: unknown family, with the list.
        GrowthError: naming the leaf, both shapes and the axis that no rule covers.
    """
    if family not in FAMILIES:
        raise ConfigError(f"growth family '{family}'{nearest(family, FAMILIES)}")
    try:
        return FAMILIES[family][axis](leaf, old, new)
    except KeyError:
        raise GrowthError(
            f"{path} {shapes}: family '{family}' has no rule for axis '{axis}' ({leaf.role(axis)})"
        ) from None
