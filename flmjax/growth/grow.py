"""Growth: pure functions from the state of a model to the state of a larger one."""

import dataclasses
from typing import Any, NamedTuple

import jax

from flmjax.config import SIZES, GrowthConfig, ModelConfig, resize, split_factor
from flmjax.growth.families import family_of
from flmjax.growth.optimizer_state import map_adam
from flmjax.growth.rules import (
    DIMENSIONS,
    Growing,
    GrowthError,
    copy,
    dim_sizes,
    grow_leaf,
    growing_dimensions,
    leaf_dims,
    rule_for,
)
from flmjax.model.transformer import abstract_params, init_params
from flmjax.sharding.axes import LeafAxes, axis_sizes, map_with_axes

# How a model computes; may differ between the old and the new one without changing the function.
EXECUTION = ("dtype", "attention", "remat", "scan_unroll", "vocab_multiple")


def grow(state: Any, old: ModelConfig, new: ModelConfig, operator: GrowthConfig, key: jax.Array) -> Any:
    """Grow a training state; pure and jittable (give jit the new mesh's out_shardings).

    Args:
        state: has `params`, `opt_state` and `replace`, as training.state.TrainState.
        old, new: configurations; `new` is config.resize(old, family, ...): no size smaller, the norm's epsilon scaled.
        operator: the family (families.FAMILIES) and its settings.
        key: for fresh weights and the shares of copies.

    Raises:
        GrowthError: naming the field or the leaf with both shapes.
        ConfigError: for an unknown family.
    """
    return state.replace(
        params=grow_params(state.params, old, new, operator, key),
        opt_state=grow_opt_state(state.opt_state, old, new, operator, key),
    )


def grow_params(params: Any, old: ModelConfig, new: ModelConfig, operator: GrowthConfig, key: jax.Array) -> Any:
    """Grow bare parameters; see `grow`."""
    family, growing = _prepare(old, new, operator, key)
    fresh = init_params(new, key)

    def grow_one(path: str, leaf: LeafAxes, x: jax.Array, fresh: jax.Array) -> jax.Array:
        grown = grow_leaf(path, leaf, x, fresh, family.axes, growing, (old, new))
        changed = any(dim in growing for _, dim in leaf_dims(leaf))
        return family.finish(leaf, grown, fresh, operator) if family.finish and changed else grown

    return map_with_axes(grow_one, abstract_params(old)[1], params, fresh)


def grow_opt_state(opt_state: Any, old: ModelConfig, new: ModelConfig, operator: GrowthConfig, key: jax.Array) -> Any:
    """Grow a bare optimizer state; `key` must be the parameters'.

    Moments follow their weights' gradients (Rule.gradient), never the weights; entries without a history get 0 and are
    born now, so that their first update is no larger than the learning rate.
    """
    family, growing = _prepare(old, new, operator, key)
    axes = abstract_params(old)[1]

    def grow_moment(moments: Any, power: int) -> Any:
        def grow_one(path: str, leaf: LeafAxes, x: jax.Array) -> jax.Array:
            grown = grow_leaf(path, leaf, x, None, family.axes, growing, (old, new), power)
            return grown if operator.moments == "carry" else jax.numpy.zeros_like(grown)

        return map_with_axes(grow_one, axes, moments)

    def grow_births(births: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
        return {name: _grow_births(name, births[name], count, growing, old, new) for name in births}

    return map_adam(opt_state, grow_moment, grow_births, reset=operator.moments == "reset")


class LeafPlan(NamedTuple):
    """What growth will do to one leaf: shapes, and a line for each dimension."""

    path: str
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    rules: tuple[str, ...]


def plan_growth(old: ModelConfig, new: ModelConfig, operator: GrowthConfig) -> list[LeafPlan]:
    """The plan of every leaf, in tree order, without touching a weight.

    Raises:
        GrowthError, ConfigError: as `grow` would.
    """
    family, growing = _prepare(old, new, operator, jax.random.key(0))
    plan: list[LeafPlan] = []

    def plan_one(path: str, leaf: LeafAxes, before: Any, after: Any) -> None:
        rules = [
            _describe(growing[dim], rule_for(path, leaf, axis, dim, family.axes, growing[dim]))
            for axis, dim in leaf_dims(leaf)
            if dim in growing
        ]
        plan.append(LeafPlan(path, before.shape, after.shape, tuple(rules)))

    (before, axes), (after, _) = abstract_params(old), abstract_params(new)
    map_with_axes(plan_one, axes, before, after)
    return plan


def check_growth(old: ModelConfig, new: ModelConfig, operator: GrowthConfig) -> None:
    """Whether `new` is a larger version of `old` that can compute the same function.

    Raises:
        GrowthError: naming the field and both values.
    """
    derived = ("norm_eps", "rotary_dim", "rotary_repeat")
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after and field.name not in (*SIZES, *EXECUTION, *derived):
            raise GrowthError(f"growth cannot change {field.name} from {before} to {after}")
    for name in SIZES:
        before, after = (c.kv_heads if name == "num_kv_heads" else getattr(c, name) for c in (old, new))
        if after < before:
            raise GrowthError(f"{name} would shrink from {before} to {after}; growth needs every size to stay or grow")
    split_factor(old, new)
    expected = resize(old, operator.family, **{name: getattr(new, name) for name in SIZES})
    if abs(new.norm_eps - expected.norm_eps) > 1e-9 * expected.norm_eps:
        raise GrowthError(
            f"norm_eps must be {expected.norm_eps} after growth, not {new.norm_eps}; take config.resize(old, ...)"
        )
    # The old frequencies stay. Those of new dimensions are free, unless the dimensions are copies.
    if new.position != "learned" and new.rotated_dims != old.rotated_dims:
        raise GrowthError(
            f"rotary_dim must be {old.rotated_dims} after growth, not {new.rotary_dim}: other frequencies turn the old "
            "dimensions by other angles; take config.resize(old, ...)"
        )
    already = old.head_dim > old.rotated_dims
    if new.rotary_repeat != (old if already else expected).rotary_repeat:
        raise GrowthError(
            f"rotary_repeat must be {expected.rotary_repeat} for family '{operator.family}' from head_dim "
            f"{old.head_dim} to {new.head_dim}; take config.resize(old, '{operator.family}', ...)"
        )


def _prepare(old: ModelConfig, new: ModelConfig, operator: GrowthConfig, key: jax.Array) -> tuple[Any, dict]:
    family = family_of(operator)
    check_growth(old, new, operator)
    return family, growing_dimensions(family.axes, old, new, operator, jax.random.fold_in(key, 1))


def _grow_births(
    axis: str, births: jax.Array, count: jax.Array, growing: dict[str, Growing], old: ModelConfig, new: ModelConfig
) -> jax.Array:
    """The vector of one axis: a copy is as old as its source, a new place is born now."""
    parts = split_factor(old, new)
    if axis == "kv_heads" and parts > 1:
        births = jax.numpy.repeat(births, parts)
    out = births.reshape(list(dim_sizes(axis, old, parts).values()))
    for i, dim in enumerate(DIMENSIONS[axis]):
        if dim in growing:
            out = copy(out, {i: growing[dim].source})
            here = growing[dim].is_new.reshape([-1 if i == j else 1 for j in range(out.ndim)])
            out = jax.numpy.where(here, count, out)
    return out.reshape(axis_sizes(new)[axis])


def _describe(growing: Growing, rule: Any) -> str:
    text = f"{growing.name} {growing.before} -> {growing.after}"
    if growing.is_new.any():
        text += {"zero": ", new ones 0", "fresh": ", new ones fresh", "mean": ", new ones the mean"}[rule.fill]
    if growing.copies.max() > 1:
        text += f", {sum(growing.source >= 0) - len(set(growing.source[growing.source >= 0]))} copies"
    if isinstance(rule.weight, float):
        return text + (f", old ones x {rule.weight:.4g}" if rule.weight != 1.0 else "")
    return text + ", x shares" if growing.copies.max() > 1 else text
