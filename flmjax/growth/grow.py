"""Growth: pure functions from the state of a model to the state of a larger one."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flmjax.config import SIZES, ModelConfig, resize
from flmjax.growth.operators import GrowthError, Rule, rule_for
from flmjax.growth.optimizer_state import grow_optimizer_state
from flmjax.model.axes import LeafAxes, map_with_axes
from flmjax.model.transformer import abstract_params, init_params

# How a model computes; may differ between the old and the new one without changing the function.
EXECUTION = ("dtype", "attention", "remat", "scan_unroll")


def grow(state: Any, old: ModelConfig, new: ModelConfig, family: str, key: jax.Array) -> Any:
    """Grow a training state; pure and jittable (give jit the new mesh's out_shardings).

    Args:
        state: has `params`, `opt_state` and `replace`, as training.state.TrainState.
        old, new: configurations; `new` is config.resize(old, ...): no size smaller, the norm's epsilon scaled.
        family: operators.FAMILIES, "zero" is exact for every size.
        key: for the fresh weights.

    Raises:
        GrowthError: naming the field or the leaf with both shapes.
        ConfigError: for an unknown family.
    """
    check_growth(old, new)
    axes = abstract_params(old)[1]

    def grow_moment(moments: Any, power: int) -> Any:
        return map_with_axes(
            lambda path, leaf, x: _grow_leaf(path, leaf, x, None, family, old, new, power), axes, moments
        )

    return state.replace(
        params=grow_params(state.params, old, new, family, key),
        opt_state=grow_optimizer_state(state.opt_state, grow_moment),
    )


def grow_params(params: Any, old: ModelConfig, new: ModelConfig, family: str, key: jax.Array) -> Any:
    """Grow bare parameters; see `grow`."""
    check_growth(old, new)
    axes = abstract_params(old)[1]
    fresh = init_params(new, key)
    return map_with_axes(
        lambda path, leaf, x, f: _grow_leaf(path, leaf, x, f, family, old, new, 0), axes, params, fresh
    )


def check_growth(old: ModelConfig, new: ModelConfig) -> None:
    """Whether `new` is a larger version of `old` that can compute the same function.

    Raises:
        GrowthError: naming the field and both values.
    """
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after and field.name not in (*SIZES, *EXECUTION, "norm_eps"):
            raise GrowthError(f"growth cannot change {field.name} from {before} to {after}")
    sizes = {field: (getattr(old, field), getattr(new, field)) for field in SIZES if field != "num_kv_heads"}
    sizes["num_kv_heads"] = (old.kv_heads, new.kv_heads)
    sizes["query heads per key head"] = (old.num_heads // old.kv_heads, new.num_heads // new.kv_heads)
    for name, (before, after) in sizes.items():
        if after < before:
            raise GrowthError(f"{name} would shrink from {before} to {after}; growth needs every size to stay or grow")
    expected = resize(old, embed_dim=new.embed_dim).norm_eps
    if abs(new.norm_eps - expected) > 1e-9 * expected:
        raise GrowthError(f"norm_eps must be {expected} after growth, not {new.norm_eps}; take config.resize(old, ...)")


def _grow_leaf(
    path: str,
    leaf: LeafAxes,
    x: jax.Array,
    fresh: jax.Array | None,
    family: str,
    old: ModelConfig,
    new: ModelConfig,
    power: int,
) -> jax.Array:
    """One parameter (power 0) or its first or second moment (power 1, 2; fresh is None and every fill is 0).

    Padding and a mask from an iota, never an update of a slice: into a sharded array that gathers the whole of it.
    """
    names = [dim for name in leaf.names for dim in _dims(name, old)]
    before = [size for name in leaf.names for size in _dims(name, old).values()]
    after = [size for name in leaf.names for size in _dims(name, new).values()]
    shape = tuple(size for name in leaf.names for size in [_size(name, new)])
    if x.size != math.prod(before):
        raise GrowthError(f"{path} has shape {x.shape}; the old configuration says {tuple(before)}")
    out = x.reshape(before)
    if fresh is not None:
        fresh = fresh.reshape(after).astype(x.dtype)
    rules = {
        i: rule_for(path, leaf, _axis(name), family, old, new, f"{x.shape} -> {shape}")
        for i, name in enumerate(names)
        if before[i] != after[i]
    }
    factor = math.prod(rule.factor for rule in rules.values())
    if factor != 1.0:
        out = out * jnp.asarray(factor if power == 0 else factor**-power, x.dtype)
    out = jnp.pad(out, [(0, n - m) for m, n in zip(before, after, strict=True)])
    for i, rule in rules.items():
        out = _fill(out, i, before[i], rule if fresh is not None else Rule("zero"), fresh)
    return out.reshape(shape)


def _fill(x: jax.Array, dim: int, old_size: int, rule: Rule, fresh: jax.Array | None) -> jax.Array:
    """Set the entries from `old_size` on along `dim`; they hold zeros."""
    if rule.fill == "zero":
        # Not a no-op: an earlier dimension may have put something there.
        values: Any = jnp.zeros((), x.dtype)
    elif rule.fill == "mean":
        is_old = jax.lax.broadcasted_iota(jnp.int32, x.shape, dim) < old_size
        values = jnp.sum(jnp.where(is_old, x, 0), axis=dim, keepdims=True) / old_size
    else:
        values = fresh
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, dim) < old_size, x, values)


def _size(name: str, config: ModelConfig) -> int:
    return math.prod(_dims(name, config).values())


def _dims(name: str, config: ModelConfig) -> dict[str, int]:
    """Dimensions of an axis. Query heads are groups x heads of a group: both grow at their own end, else a new head
    would land in a neighbour's group."""
    if name == "heads":
        return {"groups": config.kv_heads, "heads": config.num_heads // config.kv_heads}
    sizes = {
        "layers": config.num_layers,
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.padded_vocab_size,
        "length": config.max_length,
    }
    return {name: sizes[name]}


def _axis(dim: str) -> str:
    return "heads" if dim == "groups" else dim
