"""The growth mask while it opens, during the first updates of a stage; masks.py defines it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import GrowthConfig, Stage
from flmjax.growth import masks, zero
from flmjax.growth.growth import Growth
from flmjax.growth.rules import Dimension, along, leaf_dims, leaf_sizes
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import LeafAxes, Params, map_with_axes


def openness(config: GrowthConfig, updates: jax.typing.ArrayLike) -> jax.Array:
    """Openness c of the growth mask after `updates` updates since growth: 0 at growth, 1 from ramp_steps on."""
    part = jnp.clip(jnp.asarray(updates, jnp.float32) / config.ramp_steps, 0.0, 1.0)
    return {"linear": part, "cosine": (1 - jnp.cos(jnp.pi * part)) / 2}[config.ramp]


class Ramp(NamedTuple):
    """A stage's growth mask: closed at step `start`, fully open and removed at step `end`."""

    growth: Growth
    start: int

    @property
    def end(self) -> int:
        """First step of the run that trains without the mask."""
        return self.start + self.growth.config.ramp_steps

    def at(self, params: Params, step: jax.typing.ArrayLike) -> Params:
        """Masked parameters, which the model computes with at `step`."""
        return masked(params, self.growth, openness(self.growth.config, step - self.start))


def ramp_of(stage: Stage) -> Ramp | None:
    """The growth mask that opens during a stage; None if its growth has no mask."""
    return Ramp(Growth.into(stage), stage.start) if stage.ramp else None


def masked(params: Params, growth: Growth, c: jax.typing.ArrayLike) -> Params:
    """Masked parameters, which the model computes with at openness `c` of the growth mask."""

    def mask(_: str, leaf: LeafAxes, x: jax.Array) -> jax.Array:
        out = x.reshape(leaf_sizes(leaf, growth.new))
        for i, (axis, dim) in enumerate(leaf_dims(leaf)):
            if dim in growth.dimensions:
                role = str(leaf.role(axis))
                out = _mask_dimension(out, i, role, leaf, growth.dimensions[dim], jnp.asarray(c, x.dtype))
        return out.reshape(x.shape)

    masked_params: Params = map_with_axes(mask, abstract_params(growth.new)[1], params)
    return masked_params


def _mask_dimension(x: jax.Array, dim: int, role: str, leaf: LeafAxes, d: Dimension, c: jax.Array) -> jax.Array:
    closed = zero.AXES[d.name].rule(role, leaf, d)
    weight = closed.weight / masks.keep(role, leaf, d).weight
    if weight != 1.0:
        x = x * jnp.sqrt(weight**2 + c**2 * (1 - weight**2))
    at_new = along(d.is_new, dim, x.ndim)
    if closed.fill == "zero":
        return jnp.where(at_new, c * x, x)
    if closed.fill == "mean":
        mean = jnp.sum(jnp.where(at_new, 0, x), axis=dim, keepdims=True) / np.sum(~d.is_new)
        return jnp.where(at_new, (1 - c) * mean + c * x, x)
    return x
