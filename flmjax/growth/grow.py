"""Growth of a training state: pure functions from the state of a model to the state of a larger model."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from flmjax.growth.growth import Growth
from flmjax.growth.optimizer_state import map_adam
from flmjax.growth.rules import DIMENSIONS, Dimension, Rule, copy, dim_sizes
from flmjax.model.transformer import abstract_params, init_params
from flmjax.sharding.axes import LeafAxes, Params, axis_sizes, map_with_axes

State = TypeVar("State", bound=Any)  # a class of training states


def grow(state: State, growth: Growth) -> State:
    """The training state of the larger model; pure and jittable (pass the new shardings as jit's out_shardings).

    Args:
        state: any class with `params`, `opt_state` and `replace`, such as training.state.TrainState.

    Raises:
        GrowthError: naming a leaf with both shapes.
    """
    grown: State = state.replace(
        params=grow_params(state.params, growth), opt_state=grow_opt_state(state.opt_state, growth)
    )
    return grown


def grow_params(params: Params, growth: Growth) -> Params:
    """The parameters of the larger model; raises as `grow`."""
    assert growth.key is not None, "growth of parameters draws fresh ones: it needs a key"
    family, fresh = growth.family, init_params(growth.new, growth.key)

    def grow_one(path: str, leaf: LeafAxes, x: jax.Array, fresh: jax.Array) -> jax.Array:
        grown = growth.grow_leaf(path, leaf, x, fresh)
        if family.finish is None or not growth.rules_of(path, leaf):
            return grown
        return family.finish(leaf, grown, fresh, growth.config)

    grown_params: Params = map_with_axes(grow_one, abstract_params(growth.old)[1], params, fresh)
    return grown_params


def grow_opt_state(opt_state: optax.OptState, growth: Growth) -> optax.OptState:
    """The optimizer state of the larger model, for the same growth as its parameters.

    Moments are scaled like the gradients of their parameters (Rule.gradient), not like the parameters. Moments of new
    entries are 0, and their age starts at 0, so that their first update is no larger than the learning rate.
    """

    # The same shares, drawn again: where parameters and moments had them in common, XLA kept more arrays alive
    # (FLM-101B from 16B to 51B by duplication: 15.5 GB of temporaries in place of 9.4). The barrier keeps XLA from
    # finding out that the draws are equal.
    if growth.key is not None:
        key_data = jax.lax.optimization_barrier(jax.random.key_data(growth.key))
        growth = dataclasses.replace(growth, key=jax.random.wrap_key_data(key_data))

    def grow_moment(moments: Params, power: int) -> Any:
        def grow_one(path: str, leaf: LeafAxes, x: jax.Array) -> jax.Array:
            grown = growth.grow_leaf(path, leaf, x, power=power)
            return grown if growth.config.moments == "carry" else jnp.zeros_like(grown)

        return map_with_axes(grow_one, abstract_params(growth.old)[1], moments)

    def grow_places(vectors: dict[str, jax.Array], new: jax.Array) -> dict[str, jax.Array]:
        return {name: _grow_places(name, vector, new, growth) for name, vector in vectors.items()}

    return map_adam(opt_state, grow_moment, grow_places, growth.new_warmup, reset=growth.config.moments == "reset")


class LeafPlan(NamedTuple):
    """Plan of one leaf's growth: its path, both shapes, and a line of text for each dimension that grows."""

    path: str
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    rules: tuple[str, ...]


def plan_growth(growth: Growth) -> list[LeafPlan]:
    """Plans of all leaves in tree order, from the configurations alone."""
    plan: list[LeafPlan] = []

    def plan_one(path: str, leaf: LeafAxes, before: jax.ShapeDtypeStruct, after: jax.ShapeDtypeStruct) -> None:
        rules = tuple(_describe(dimension, rule) for _, dimension, rule in growth.rules_of(path, leaf))
        plan.append(LeafPlan(path, before.shape, after.shape, rules))

    (before, axes), (after, _) = abstract_params(growth.old), abstract_params(growth.new)
    map_with_axes(plan_one, axes, before, after)
    return plan


def _grow_places(axis: str, vector: jax.Array, new: jax.Array, growth: Growth) -> jax.Array:
    """Vector of one axis in the larger model: a copy has its source's value, a place without a source has `new`."""
    if axis == "kv_heads" and growth.split > 1:
        vector = jnp.repeat(vector, growth.split)
    out = vector.reshape(list(dim_sizes(axis, growth.old, growth.split).values()))
    for i, name in enumerate(DIMENSIONS[axis]):
        if name in growth.dimensions:
            dimension = growth.dimensions[name]
            out = copy(out, {i: dimension.source})
            is_new = dimension.is_new.reshape([-1 if i == j else 1 for j in range(out.ndim)])
            out = jnp.where(is_new, new, out)
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
