"""The perturb family: shrink, pad, perturb. A warm start that does not keep the function.

Matrices become shrink * pad(theta) + a fresh initialisation (muP warm starting, 2024, and the warm-start study arXiv
2605.13405), so that new directions get gradients from the first update. Gains, shifts and biases are only padded.
"""

import jax
import jax.numpy as jnp

from flmjax.config import GrowthConfig
from flmjax.growth.rules import AxisRule, Dimension, Rule, at_the_end
from flmjax.sharding.axes import AXES as ALL
from flmjax.sharding.axes import LeafAxes


def pad(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of every axis: new places of matrices are 0 (`perturb` adds to them), of vectors as initialised."""
    return Rule("zero" if leaf.is_matrix else "fresh")


def perturb(leaf: LeafAxes, x: jax.Array, fresh: jax.Array, operator: GrowthConfig) -> jax.Array:
    """A padded parameter, shrunk and with fresh values added if it is a matrix."""
    return jnp.asarray(operator.shrink, x.dtype) * x + fresh.astype(x.dtype) if leaf.is_matrix else x


AXES = {name: AxisRule(at_the_end, pad) for name in ALL}
