"""Depth by copied layers: a head start, not the same function. Every other axis grows as in the zero family.

stack: 0 1 2 0 1 2 (StackBERT; G_stack, arXiv 2405.15319). interleave: 0 0 1 1 2 2. middle: 0 1 1 2 (MIDAS, arXiv
2409.19044). Moments are copied with their layers.
"""

import numpy as np

from flmjax.config import ModelConfig
from flmjax.growth import zero
from flmjax.growth.rules import AxisRule, Dimension, Rule
from flmjax.sharding.axes import LeafAxes


def stack(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """The whole stack again, on top."""
    return np.arange(after) % before


def interleave(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Each layer again, right after itself, as evenly as it goes."""
    return np.arange(after) * before // after


def middle(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """The middle layers again, after themselves; first and last layers, which differ most, stay alone.

    The block that is copied has as many layers as are new, at most half of the old ones; it is copied until it fills.
    """
    extra = after - before
    block = max(1, min(extra, before // 2))
    start = (before - block) // 2
    copies = start + np.arange(extra) % block
    return np.concatenate([np.arange(start + block), copies, np.arange(start + block, before)])


def copied(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """A layer as it is, its moments too: what its gradient will be, nobody knows."""
    return Rule("fresh", 1.0, 1.0)


STACK = {**zero.AXES, "layers": AxisRule(stack, copied)}
INTERLEAVE = {**zero.AXES, "layers": AxisRule(interleave, copied)}
MIDDLE = {**zero.AXES, "layers": AxisRule(middle, copied)}
