"""Growth: pure functions from the state of a model to the state of a larger one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flmjax.growth.growth import Growth
from flmjax.growth.optimizer_state import map_adam
from flmjax.growth.rules import DIMENSIONS, Dimension, Rule, copy, dim_sizes
from flmjax.model.transformer import abstract_params, init_params
from flmjax.sharding.axes import LeafAxes, axis_sizes, map_with_axes


def grow(state: Any, growth: Growth) -> Any:
    """Grow a training state; pure and jittable (give jit the new mesh's out_shardings).

    Args:
        state: has `params`, `opt_state` and `replace`, as training.state.TrainState.

    Raises:
        GrowthError: naming a leaf with both shapes.
    """
    return state.replace(params=grow_params(state.params, growth), opt_state=grow_opt_state(state.opt_state, growth))


def grow_params(params: Any, growth: Growth) -> Any:
    """Grow bare parameters; see `grow`."""
    assert growth.key is not None, "growth of parameters draws fresh ones: it needs a key"
    family, fresh = growth.family, init_params(growth.new, growth.key)

    def grow_one(path: str, leaf: LeafAxes, x: jax.Array, fresh: jax.Array) -> jax.Array:
        grown = growth.grow_leaf(path, leaf, x, fresh)
        if family.finish is None or not growth.rules_of(path, leaf):
            return grown
        return family.finish(leaf, grown, fresh, growth.config)

    return map_with_axes(grow_one, abstract_params(growth.old)[1], params, fresh)


def grow_opt_state(opt_state: Any, growth: Growth) -> Any:
    """Grow a bare optimizer state, with the growth of its parameters.

    Moments follow their parameters' gradients (Rule.gradient), never the parameters; entries without a history get 0
    and are born now, so that their first update is no larger than the learning rate.
    """

    def grow_moment(moments: Any, power: int) -> Any:
        def grow_one(path: str, leaf: LeafAxes, x: jax.Array) -> jax.Array:
            grown = growth.grow_leaf(path, leaf, x, power=power)
            return grown if growth.config.moments == "carry" else jnp.zeros_like(grown)

        return map_with_axes(grow_one, abstract_params(growth.old)[1], moments)

    def grow_births(births: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
        return {name: _grow_births(name, births[name], count, growth) for name in births}

    return map_adam(opt_state, grow_moment, grow_births, reset=growth.config.moments == "reset")


class LeafPlan(NamedTuple):
    """What growth will do to one leaf: its path, both shapes, and a line for each dimension that grows."""

    path: str
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    rules: tuple[str, ...]


def plan_growth(growth: Growth) -> list[LeafPlan]:
    """The plan of every leaf, in tree order, without touching a parameter."""
    plan: list[LeafPlan] = []

    def plan_one(path: str, leaf: LeafAxes, before: Any, after: Any) -> None:
        rules = tuple(_describe(dimension, rule) for _, dimension, rule in growth.rules_of(path, leaf))
        plan.append(LeafPlan(path, before.shape, after.shape, rules))

    (before, axes), (after, _) = abstract_params(growth.old), abstract_params(growth.new)
    map_with_axes(plan_one, axes, before, after)
    return plan


def _grow_births(axis: str, births: jax.Array, count: jax.Array, growth: Growth) -> jax.Array:
    """The births of one axis: a copy is as old as its source, a new place is born now."""
    if axis == "kv_heads" and growth.split > 1:
        births = jnp.repeat(births, growth.split)
    out = births.reshape(list(dim_sizes(axis, growth.old, growth.split).values()))
    for i, name in enumerate(DIMENSIONS[axis]):
        if name in growth.dimensions:
            dimension = growth.dimensions[name]
            out = copy(out, {i: dimension.source})
            is_new = dimension.is_new.reshape([-1 if i == j else 1 for j in range(out.ndim)])
            out = jnp.where(is_new, count, out)
    return out.reshape(axis_sizes(growth.new)[axis])


def _describe(dimension: Dimension, rule: Rule) -> str:
    text = f"{dimension.name} {dimension.before} -> {dimension.after}"
    if dimension.is_new.any():
        text += {"zero": ", new ones 0", "fresh": ", new ones fresh", "mean": ", new ones the mean"}[rule.fill]
    if dimension.copies.max() > 1:
        sources = dimension.source[dimension.source >= 0]
        text += f", {len(sources) - len(set(sources))} copies"
    if isinstance(rule.weight, float):
        return text + (f", old ones x {rule.weight:.4g}" if rule.weight != 1.0 else "")
    return text + ", x shares" if dimension.copies.max() > 1 else text
