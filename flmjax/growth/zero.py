"""The zero family: exact at any size, on every axis.

What makes a new unit is fresh, what reads it is 0 (Net2Net's zero fan-out). A wider residual stream holds the mean of
the old entries (LayerNorm, after LEMON, arXiv 2310.07999) or 0 (RMSNorm) in its new ones, which their norm turns into
0; gain sqrt(d/d') and epsilon d/d' (config.resize) take back what d' instead of d did to the variance.
"""

import math

from flmjax.growth.rules import AxisRule, Dimension, Rule, at_the_end
from flmjax.model.mup import logit_growth
from flmjax.sharding.axes import LeafAxes


def embed(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Residual width. The normalised new entries are 0: what reads them is free, and so are their gains.

    Under muP the logits are divided by the width; the last norm, not the multiplier, takes that back.
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
    """MLP units, query heads, key heads with their query heads."""
    return {"write": Rule("fresh"), "read": Rule("zero")}[role]


def head_dim(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Size of the heads: new keys are 0; scores are divided by sqrt(K') instead of sqrt(K), which queries take back."""
    root = math.sqrt(d.new.head_dim / d.old.head_dim)
    return {"query": Rule("fresh", root), "key": Rule("zero"), "write": Rule("fresh"), "read": Rule("zero")}[role]


def layers(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Depth, at the top: a new block is fresh but for what writes to the residual stream, which is 0 (identity)."""
    return Rule("zero" if leaf.role("embed") == "write" else "fresh")


def fresh(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Words and places that no old input has: any rows will do."""
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
