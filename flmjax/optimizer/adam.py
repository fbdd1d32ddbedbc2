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


FIRST = -1  # the birth of what no growth created


class AdamState(NamedTuple):
    """Adam's moments and count, and the ages of all parameters.

    A parameter is as old as the youngest of its places along its axes: one vector per axis dates every entry of every
    leaf.

    Attributes:
        births: per axis (size,) int32, the count at which growth created each place; FIRST for places of the first
            model.
        reset: int32, the count at which growth last set all moments to 0; 0 if it never did.
    """

    adam: optax.ScaleByAdamState
    births: dict[str, jax.Array]
    reset: jax.Array


def scale_by_adam(config: OptimizerConfig, model: ModelConfig, axes: Any) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam with the bias corrected by each weight's own age.

    With the run's count a weight that growth has just made would take a first update of (1 - b1) / sqrt(1 - b2): 0.45
    at (0.9, 0.95) but 3.2 at (0.9, 0.999). With its own it is at most 1, as a model's first update is.
    update(..., new_warmup=n): parameters that the newest growth created reach their full rate at their n-th update; if
    that growth reset all moments and created nothing, nothing warms up.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def init(params: Any) -> AdamState:
        births = {name: jnp.full(size, FIRST, jnp.int32) for name, size in axis_sizes(model).items()}
        return AdamState(adam.init(params), births, jnp.zeros((), jnp.int32))

    def update(
        grads: Any, state: AdamState, params: Any = None, *, new_warmup: Any = 0, **_: Any
    ) -> tuple[Any, AdamState]:
        _, moments = adam.update(grads, state.adam, params)
        ages = {name: moments.count - jnp.maximum(birth, state.reset) for name, birth in state.births.items()}
        newest = functools.reduce(jnp.maximum, [jnp.max(birth) for birth in state.births.values()])
        # Corrections fall with age and rates rise: the youngest place decides by the largest and by the smallest.
        first = {name: 1 / (1 - config.b1**age) for name, age in ages.items()}
        second = {name: 1 / (1 - config.b2**age) for name, age in ages.items()}
        rate = {
            name: jnp.where(
                (state.births[name] >= state.reset) & (state.births[name] == newest),
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

        return map_with_axes(direction, axes, moments.mu, moments.nu), state._replace(adam=moments)

    return optax.GradientTransformationExtraArgs(init, update)


def over_axes(combine: Callable[..., jax.Array], values: dict[str, jax.Array], leaf: LeafAxes) -> jax.Array:
    """An array that broadcasts over `leaf`: its axes' vectors, combined."""
    spread = []
    for i, name in enumerate(leaf.names):
        spread.append(values[name].reshape(*[1] * i, -1, *[1] * (len(leaf.names) - i - 1)))
    return functools.reduce(combine, spread)
