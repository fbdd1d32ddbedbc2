"""The duplicate family: new units are copies, and all copies of a unit share its effect. Exact at any size.

Parameters that read a copied unit are multiplied by a share; the shares of a unit's copies sum to 1 (Net2Net,
bert2BERT). Shares are drawn unequal, since copies with equal shares get equal gradients and stay equal (LEMON). Entries
of the residual stream are divided by the root of their number of copies, so that the sum of squares, and with it the
factor of epsilon, is the same as in the zero family. Depth, vocabulary and length grow as in the zero family, but new
words start as the mean of the old words.
The gradients of copies follow from the chain rule: parameters that write a copy get its share of the old gradient,
parameters that read a copy get the old gradient. On the residual stream this holds for the direct path; through a
norm's denominator copies get equal parts, which the shares of the moments do not represent. On a sharded model each
device receives up to 3x the bytes of its part of the new state (16B to 51B on 192 devices: 2.8x, the zero family 2.2x),
from neighbours; no leaf is gathered.
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
    """Sources 0 ... n-1, 0 ... n-1, ... of an axis whose places are copied in order."""
    return np.arange(after) % before


def cyclic_embed(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Sources of the residual width. LayerNorm's mean is kept only if all entries have equally many copies: the entries
    that are left after the last complete copy have no source and hold the mean."""
    places = np.arange(after)
    complete = after - after % before if new.norm == "layernorm" else after
    return np.where(places < complete, places % before, -1)


def same_frequency(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Sources of head_dim: each has the frequency of its copy, or does not turn if the copy does not."""
    places = np.arange(after)
    if not new.is_rotary:
        return places % before
    K = new.rotated_dims
    if new.rotary_repeat:
        return np.where(places < before, places, places % K)
    if before == K:  # every old dimension turns: none can be the source of one that does not
        return at_the_end(before, after, old, new)
    return np.where(places < before, places, K + (places - K) % (before - K))


def embed(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of the residual width: r = d/d', `copies` with shares a.

    A tied embedding is read and written, so it cannot carry the shares: the last norm's gain carries them, and also the
    factor by which muP divides the logits.
    """
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
    """Rule of MLP units, query heads and groups of query heads."""
    return {"write": Rule("fresh", 1.0, d.share), "read": Rule("zero", d.share, 1.0)}[role]


def head_dim(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of head_dim: keys and the output projection take shares; queries take back the factor of sqrt(K')."""
    root: Any = math.sqrt(d.new.head_dim / d.old.head_dim)
    return {
        "query": Rule("fresh", root, d.share / root),
        "key": Rule("zero", d.share, 1.0),
        "write": Rule("fresh", 1.0, d.share),
        "read": Rule("zero", d.share, 1.0),
    }[role]


def mean(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of the vocabulary: new words start as the mean of the old words."""
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
