"""The families stack, interleave and middle: new layers are copies of old layers; other axes grow as in family zero.

The function changes: copied layers are a better start than fresh ones, but not an exact one. Order of the old layers:
    stack       0 1 2 0 1 2   (StackBERT; G_stack, arXiv 2405.15319)
    interleave  0 0 1 1 2 2
    middle      0 1 1 2       (MIDAS, arXiv 2409.19044)
Adam's moments are copied with their layers.
"""

import numpy as np

from flmjax.config import ModelConfig
from flmjax.growth import zero
from flmjax.growth.rules import AxisRule, Dimension, Rule
from flmjax.sharding.axes import LeafAxes


def stack(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Source of each layer when the old layers are repeated in order: 0 1 2 -> 0 1 2 0 1 2."""
    return np.arange(after) % before


def interleave(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Source of each layer when each old layer is followed by its copies, spread evenly: 0 1 2 -> 0 0 1 1 2 2."""
    return np.arange(after) * before // after


def middle(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Source of each layer when a block of middle layers is followed by its copies: 0 1 2 -> 0 1 1 2.

    The first and last layers, which differ most from the others, are not copied. The block has as many layers as are
    added, at most half of the old layers; it is repeated until all new layers have a source.
    """
    extra = after - before
    block = max(1, min(extra, before // 2))
    start = (before - block) // 2
    copies = start + np.arange(extra) % block
    return np.concatenate([np.arange(start + block), copies, np.arange(start + block, before)])


def copied(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of a copied layer: parameters and moments are copied unchanged, since the new gradient is not known."""
    return Rule("fresh", 1.0, 1.0)


STACK = {**zero.AXES, "layers": AxisRule(stack, copied)}
INTERLEAVE = {**zero.AXES, "layers": AxisRule(interleave, copied)}
MIDDLE = {**zero.AXES, "layers": AxisRule(middle, copied)}
