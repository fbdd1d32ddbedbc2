"""Shrink, pad, perturb: a warm start that gives the function up on purpose.

theta' = shrink * pad(theta) + a fresh initialisation, on matrices (muP warm starting, 2024, and the warm-start
study arXiv 2605.13405): new directions get gradients at once. Gains, shifts and biases are padded.
"""

import jax
import jax.numpy as jnp

from flmjax.config import GrowthConfig
from flmjax.growth.rules import AxisRule, Dimension, Rule, at_the_end
from flmjax.sharding.axes import AXES as ALL
from flmjax.sharding.axes import LeafAxes


def pad(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Zeros, for matrices to be added to; else what a new model has."""
    return Rule("zero" if leaf.is_matrix else "fresh")


def perturb(leaf: LeafAxes, x: jax.Array, fresh: jax.Array, operator: GrowthConfig) -> jax.Array:
    """A padded leaf, shrunk and perturbed."""
    return jnp.asarray(operator.shrink, x.dtype) * x + fresh.astype(x.dtype) if leaf.is_matrix else x


AXES = {name: AxisRule(at_the_end, pad) for name in ALL}
