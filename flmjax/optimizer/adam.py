"""AdamW whose weights have ages of their own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flmjax.config import ModelConfig, OptimizerConfig
from flmjax.model.mup import scaling_of
from flmjax.sharding.axes import LeafAxes, axis_sizes, map_with_axes


def make_optimizer(config: OptimizerConfig, model: ModelConfig, axes: Any) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam, weight decay; how each leaf's part scales is said by model/mup.py.

    The training step multiplies by the learning rate, which is an argument of the compiled step, so that another
    schedule compiles nothing anew.

    Args:
        model: gives the sizes of the axes and the scaling table.
        axes: tree of LeafAxes of the parameters.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = functools.partial(_add_decay, config, model, axes)
    return optax.chain(clip, scale_by_adam(config, model, axes), optax.stateless(decay))


def _add_decay(config: OptimizerConfig, model: ModelConfig, axes: Any, updates: Any, params: Any) -> Any:
    def add(_: str, leaf: LeafAxes, update: jax.Array, parameter: jax.Array) -> jax.Array:
        factor = config.weight_decay * scaling_of(model, leaf).weight_decay
        return update + factor * parameter if factor else update

    return map_with_axes(add, axes, updates, params)


class AdamState(NamedTuple):
    """Adam's moments and count; per axis, when each of its places was made: (size,) int32.

    A place that growth made holds the count of that moment; any other one -1 - n, where n is the count at which its
    moments started. A weight is as old as the youngest of its places: one vector per axis dates every weight of every
    leaf.
    """

    adam: optax.ScaleByAdamState
    births: dict[str, jax.Array]


def scale_by_adam(config: OptimizerConfig, model: ModelConfig, axes: Any) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam with the bias corrected by each weight's own age.

    With the run's count a weight that growth has just made would take a first update of (1 - b1) / sqrt(1 - b2): 0.45
    at (0.9, 0.95) but 3.2 at (0.9, 0.999). With its own it is at most 1, as a model's first update is.
    update(..., new_warmup=n): weights made by the newest growth reach their full rate at their n-th update.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def init(params: Any) -> AdamState:
        births = {name: jnp.full(size, -1, jnp.int32) for name, size in axis_sizes(model).items()}
        return AdamState(adam.init(params), births)

    def update(
        grads: Any, state: AdamState, params: Any = None, *, new_warmup: Any = 0, **_: Any
    ) -> tuple[Any, AdamState]:
        _, moments = adam.update(grads, state.adam, params)
        ages = {name: moments.count - jnp.where(birth < 0, -1 - birth, birth) for name, birth in state.births.items()}
        newest = functools.reduce(jnp.maximum, [jnp.max(birth) for birth in state.births.values()])
        # Corrections fall with age and rates rise: the youngest place decides by the largest and by the smallest.
        first = {name: 1 / (1 - config.b1**age) for name, age in ages.items()}
        second = {name: 1 / (1 - config.b2**age) for name, age in ages.items()}
        rate = {
            name: jnp.where(
                (state.births[name] >= 0) & (state.births[name] == newest),
                jnp.minimum(1.0, age / jnp.maximum(new_warmup, 1)),
                1.0,
            )
            for name, age in ages.items()
        }

        def direction(_: str, leaf: LeafAxes, mu: jax.Array, nu: jax.Array) -> jax.Array:
            scaling = scaling_of(model, leaf)
            mean = mu * over_axes(jnp.maximum, first, leaf)
            scale = jnp.sqrt(nu * over_axes(jnp.maximum, second, leaf)) + config.eps * scaling.eps
            return mean / scale * (over_axes(jnp.minimum, rate, leaf) / scaling.rate_divisor)

        return map_with_axes(direction, axes, moments.mu, moments.nu), AdamState(moments, state.births)

    return optax.GradientTransformationExtraArgs(init, update)


def over_axes(combine: Callable[..., jax.Array], values: dict[str, jax.Array], leaf: LeafAxes) -> jax.Array:
    """An array that broadcasts over `leaf`: its axes' vectors, combined."""
    spread = []
    for i, name in enumerate(leaf.names):
        spread.append(values[name].reshape(*[1] * i, -1, *[1] * (len(leaf.names) - i - 1)))
    return functools.reduce(combine, spread)
