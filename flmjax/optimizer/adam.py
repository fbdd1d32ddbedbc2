"""AdamW that corrects the bias of each parameter by the parameter's age: updates since growth created it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flmjax.config import ModelConfig, OptimizerConfig
from flmjax.model.mup import scaling_of
from flmjax.model.transformer import real_ids
from flmjax.sharding.axes import AxesTree, LeafAxes, Params, axis_sizes, map_with_axes


def make_optimizer(config: OptimizerConfig, model: ModelConfig, axes: AxesTree) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam, then weight decay, with each parameter's factors from model/mup.py.

    The updates are not multiplied by the learning rate: it is an argument of the compiled training step, so that
    another schedule needs no new compilation.

    Args:
        model: configuration with the sizes of the axes and the settings of the scaling table.
        axes: LeafAxes of the parameters.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = functools.partial(_add_decay, config, model, axes)
    return optax.chain(clip, scale_by_adam(config, model, axes), optax.stateless(decay))


def _add_decay(config: OptimizerConfig, model: ModelConfig, axes: AxesTree, updates: Params, params: Params) -> Params:
    def add(_: str, leaf: LeafAxes, update: jax.Array, parameter: jax.Array) -> jax.Array:
        factor = config.weight_decay * scaling_of(model, leaf).weight_decay
        if not factor:
            return update
        decayed = factor * parameter
        if "vocab" in leaf.names:  # padding, which has no gradient, does not move
            decayed = decayed * real_ids(model).reshape([-1 if name == "vocab" else 1 for name in leaf.names])
        return update + decayed

    decayed: Params = map_with_axes(add, axes, updates, params)
    return decayed


FIRST = -1  # birth of the places of the first model, which no growth created


class AdamState(NamedTuple):
    """Adam's moments and count, and the births from which the ages of all parameters follow.

    An entry of a parameter has one place on each axis of the parameter; its birth is the latest birth of these places.
    One vector for each axis therefore dates every entry of every parameter; a second one has the warm-up that the
    growth at the birth gave to the place.

    Attributes:
        adam: count of updates, and first and second moments.
        births: for each axis (size,) int32, the count at which growth created each place; FIRST for places of the first
            model.
        warmups: for each axis (size,) int32, the number of updates in which a place reaches its full learning rate; 0
            for places of the first model.
        reset: int32, the count at which growth last set all moments to 0; 0 if growth never did.
    """

    adam: optax.ScaleByAdamState
    births: dict[str, jax.Array]
    warmups: dict[str, jax.Array]
    reset: jax.Array


def scale_by_adam(config: OptimizerConfig, model: ModelConfig, axes: AxesTree) -> optax.GradientTransformation:
    """optax.scale_by_adam with the bias corrected by each parameter's age instead of the run's count of updates.

    Example: a new parameter has moments of 0. Corrected by the run's count, its first update would be
    (1 - b1) / sqrt(1 - b2): 0.45 at (0.9, 0.95), but 3.2 at (0.9, 0.999). Corrected by its age, the update is at most
    1, like the first update of a model.
    The learning rate of a new parameter rises linearly over its warm-up, counted from its birth: a later growth, or a
    stage that grows nothing, does not change it.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def init(params: Params) -> AdamState:
        births = {name: jnp.full(size, FIRST, jnp.int32) for name, size in axis_sizes(model).items()}
        return AdamState(adam.init(params), births, jax.tree.map(jnp.zeros_like, births), jnp.zeros((), jnp.int32))

    def update(grads: Params, state: AdamState, params: Params | None = None) -> tuple[Params, AdamState]:
        _, moments = adam.update(grads, state.adam, params)
        ages = {name: moments.count - jnp.maximum(birth, state.reset) for name, birth in state.births.items()}
        # Corrections fall with age: the youngest place has the largest. Of the rates the least counts, also where an
        # older place warms up longer.
        first = {name: 1 / (1 - config.b1**age) for name, age in ages.items()}
        second = {name: 1 / (1 - config.b2**age) for name, age in ages.items()}
        rate = {
            name: jnp.minimum(1.0, (moments.count - birth) / jnp.maximum(state.warmups[name], 1))
            for name, birth in state.births.items()
        }

        def direction(_: str, leaf: LeafAxes, mu: jax.Array, nu: jax.Array) -> jax.Array:
            scaling = scaling_of(model, leaf)
            mean = mu * over_axes(jnp.maximum, first, leaf)
            scale = jnp.sqrt(nu * over_axes(jnp.maximum, second, leaf)) + config.eps * scaling.eps
            return mean / scale * (over_axes(jnp.minimum, rate, leaf) / scaling.rate_divisor)

        return map_with_axes(direction, axes, moments.mu, moments.nu), state._replace(adam=moments)

    return optax.GradientTransformation(init, update)


def over_axes(combine: Callable[..., jax.Array], values: dict[str, jax.Array], leaf: LeafAxes) -> jax.Array:
    """Array that broadcasts over a parameter: `combine` of the vectors (size,) of all its axes.

    Args:
        values: a vector for each axis by name.
    """
    spread = []
    for i, name in enumerate(leaf.names):
        spread.append(values[name].reshape(*[1] * i, -1, *[1] * (len(leaf.names) - i - 1)))
    return functools.reduce(combine, spread)
