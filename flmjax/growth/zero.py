"""The zero family: new units have no effect at first. Exact at any size, on every axis.

Parameters that write a new unit are fresh; parameters that read it are 0 (Net2Net's zero fan-out). The new entries of a
wider residual stream hold the mean of the old entries (LayerNorm, after LEMON, arXiv 2310.07999) or 0 (RMSNorm); both
are 0 after the norm. The variance is divided by d' instead of d; the gain sqrt(d/d') and epsilon d/d' (config.resize)
take that back.
"""

import math

from flmjax.growth.rules import AxisRule, Dimension, Rule, at_the_end
from flmjax.model.mup import logit_growth
from flmjax.sharding.axes import LeafAxes


def embed(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of the residual width. New entries are 0 after the norm, so parameters that read them may have any value.

    Under muP the logits are divided by the width multiplier; the last norm's gain takes the change back.
    """
    root = math.sqrt(d.old.embed_dim / d.new.embed_dim)
    width = logit_growth(d.old, d.new)
    return {
        "write": Rule("mean" if d.new.norm == "layernorm" else "zero"),
        "read": Rule("fresh"),
        "scale": Rule("fresh", root),
        "shift": Rule("zero"),
        "output_scale": Rule("fresh", root * width),
        "output_shift": Rule("zero", width),
    }[role]


def hidden(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of MLP units, of query heads, and of key heads with their query heads."""
    return {"write": Rule("fresh"), "read": Rule("zero")}[role]


def head_dim(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of head_dim: new keys are 0. Scores are divided by sqrt(K') instead of sqrt(K); queries take that back."""
    root = math.sqrt(d.new.head_dim / d.old.head_dim)
    return {"query": Rule("fresh", root), "key": Rule("zero"), "write": Rule("fresh"), "read": Rule("zero")}[role]


def layers(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of layers: new ones are on top; they are fresh, but what writes to the residual stream is 0 (identity)."""
    return Rule("zero" if leaf.role("embed") == "write" else "fresh")


def fresh(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of vocabulary and length: no old input has the new words or positions, so their rows may have any value."""
    return Rule("fresh")


AXES = {
    "layers": AxisRule(at_the_end, layers),
    "embed": AxisRule(at_the_end, embed),
    "mlp": AxisRule(at_the_end, hidden),
    "heads": AxisRule(at_the_end, hidden),
    "kv_heads": AxisRule(at_the_end, hidden),
    "head_dim": AxisRule(at_the_end, head_dim),
    "vocab": AxisRule(at_the_end, fresh),
    "length": AxisRule(at_the_end, fresh),
}
