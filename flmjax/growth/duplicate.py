"""The duplicate family: new units are copies that share what their source did. Exact at any size.

Readers of a copied unit take a share of its weight each (Net2Net, bert2BERT); drawn unequal, so that copies part: equal
ones get equal gradients for ever (LEMON). The residual stream divides copies by the root of their number, so that the
sum of squares, and with it epsilon's factor, is that of the zero family. Depth, words and places grow as there.
The gradients of copies follow from the chain rule: what writes a copy gets its share, what reads one gets all. On the
residual stream that holds for the direct path; through a norm's denominator copies get equal parts, which unequal
shares of the moments cannot tell apart. Sharded, a device receives up to 3x the bytes of its part of the new state
(16B to 51B on 192 devices: 2.8x, the zero family 2.2x), from neighbours; no leaf is gathered.
"""

import math
from typing import Any

import numpy as np

from flmjax.config import ModelConfig
from flmjax.growth import zero
from flmjax.growth.rules import AxisRule, Dimension, Rule, at_the_end
from flmjax.model.mup import logit_growth
from flmjax.sharding.axes import LeafAxes


def cyclic(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """0 ... n-1, 0 ... n-1, ..."""
    return np.arange(after) % before


def cyclic_embed(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """LayerNorm's mean stays only if all entries have equally many copies: whole copies, the rest is their mean."""
    places = np.arange(after)
    whole = after - after % before if new.norm == "layernorm" else after
    return np.where(places < whole, places % before, -1)


def same_frequency(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """A copy turns as its source does; where new dimensions do not turn, their source must not either."""
    places = np.arange(after)
    if not new.is_rotary:
        return places % before
    K = new.rotated_dims
    if new.rotary_repeat:
        return np.where(places < before, places, places % K)
    if before == K:  # nothing stands still yet: no dimension can be copied
        return at_the_end(before, after, old, new)
    return np.where(places < before, places, K + (places - K) % (before - K))


def embed(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Residual width, r = d/d', c copies with shares a. A tied embedding reads what it writes: the last norm's gain
    carries the shares that it cannot carry itself, and the width that muP divides logits by."""
    r, width = d.old.embed_dim / d.new.embed_dim, logit_growth(d.old, d.new)
    root, gain, a = np.sqrt(d.copies), np.sqrt(r * d.copies), d.share
    tied = {
        "output_scale": Rule("fresh", gain * root * a * width, 1 / (gain * root * width)),
        "output_shift": Rule("zero", root * a * width, 1 / (root * width)),
    }
    untied = {
        "output_scale": Rule("fresh", gain * width, a / (gain * width)),
        "output_shift": Rule("zero", width, a / width),
    }
    return {
        "write": Rule("mean" if d.new.norm == "layernorm" else "zero", 1 / root, root * a),
        "read": Rule("fresh", a, 1.0),
        "scale": Rule("fresh", gain, a / gain),
        "shift": Rule("zero", 1.0, a),
        **(tied if d.new.tied_embedding else untied),
    }[role]


def hidden(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """MLP units, query heads, groups."""
    return {"write": Rule("fresh", 1.0, d.share), "read": Rule("zero", d.share, 1.0)}[role]


def head_dim(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Size of the heads: keys and the output share; queries take back sqrt(K')."""
    root: Any = math.sqrt(d.new.head_dim / d.old.head_dim)
    return {
        "query": Rule("fresh", root, d.share / root),
        "key": Rule("zero", d.share, 1.0),
        "write": Rule("fresh", 1.0, d.share),
        "read": Rule("zero", d.share, 1.0),
    }[role]


def mean(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """New words start as the mean of the old ones."""
    return Rule("mean")


AXES = {
    **zero.AXES,
    "embed": AxisRule(cyclic_embed, embed),
    "mlp": AxisRule(cyclic, hidden),
    "heads": AxisRule(cyclic, hidden),
    "kv_heads": AxisRule(cyclic, hidden),
    "head_dim": AxisRule(same_frequency, head_dim),
    "vocab": AxisRule(at_the_end, mean),
}
