"""The mask family: new weights are fresh and fade in. After MSG (arXiv 2305.02869), which FLM-101B grew by.

MSG puts masks into the layers. Here parameters are masked, the model knows nothing: at openness c a new entry is
(1 - c) x what the zero family would have put there + c x its own value. So c = 0 is the zero family's function, exact
for any fresh weights, and c = 1 is the plain model, for which the stored parameters are used as they are. In between a
RMSNorm sees MSG's masked mean square, its mask c^2; a LayerNorm also measures the new entries from the old ones' mean.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import GrowthConfig, ModelConfig
from flmjax.growth import zero
from flmjax.growth.rules import AxisRule, Growing, Rule, along, at_the_end, growing_dimensions, leaf_dims, leaf_sizes
from flmjax.model.mup import logit_growth
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import LeafAxes, map_with_axes


def keep(role: str, leaf: LeafAxes, g: Growing) -> Rule:
    """Old entries as they are, new ones fresh. Only the width that muP divides logits by is taken back for good."""
    width = logit_growth(g.old, g.new)
    return Rule("fresh", width if role.startswith("output_") else 1.0)


AXES = {name: AxisRule(at_the_end, keep) for name in zero.AXES}


def openness(operator: GrowthConfig, updates: Any) -> Any:
    """c after so many updates since growth: 0 at first, 1 from ramp_steps on."""
    part = jnp.clip(jnp.asarray(updates, jnp.float32) / operator.ramp_steps, 0.0, 1.0)
    return {"linear": part, "cosine": (1 - jnp.cos(jnp.pi * part)) / 2}[operator.ramp]


class Ramp(NamedTuple):
    """The mask of a stage while it opens: closed at step `start`, gone from step `end` on."""

    operator: GrowthConfig
    old: ModelConfig
    new: ModelConfig
    start: int

    @property
    def end(self) -> int:
        """First step that needs no mask."""
        return self.start + self.operator.ramp_steps

    def at(self, params: Any, step: Any) -> Any:
        """The parameters that the model computes with at `step`."""
        return masked(params, self.old, self.new, openness(self.operator, step - self.start))


def masked(params: Any, old: ModelConfig, new: ModelConfig, c: Any) -> Any:
    """The parameters that the model computes with while its mask is `c` open (a number or a scalar array)."""
    growing = growing_dimensions(AXES, old, new, GrowthConfig("mask"), jax.random.key(0))

    def mask(_: str, leaf: LeafAxes, x: jax.Array) -> jax.Array:
        out = x.reshape(leaf_sizes(leaf, new))
        for i, (axis, dim) in enumerate(leaf_dims(leaf)):
            if dim in growing:
                out = _mask_dimension(out, i, str(leaf.role(axis)), leaf, growing[dim], jnp.asarray(c, x.dtype))
        return out.reshape(x.shape)

    return map_with_axes(mask, abstract_params(new)[1], params)


def _mask_dimension(x: jax.Array, dim: int, role: str, leaf: LeafAxes, g: Growing, c: jax.Array) -> jax.Array:
    closed = zero.AXES[g.name].rule(role, leaf, g)
    weight = closed.weight / keep(role, leaf, g).weight
    if weight != 1.0:
        x = x * jnp.sqrt(weight**2 + c**2 * (1 - weight**2))
    here = along(g.is_new, dim, x.ndim)
    if closed.fill == "zero":
        return jnp.where(here, c * x, x)
    if closed.fill == "mean":
        mean = jnp.sum(jnp.where(here, 0, x), axis=dim, keepdims=True) / np.sum(~g.is_new)
        return jnp.where(here, (1 - c) * mean + c * x, x)
    return x
