"""Growth rules: how one dimension of a parameter grows, and the array operations that apply a rule."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import GrowthConfig, ModelConfig
from flmjax.sharding.axes import AXES, LeafAxes, axis_sizes

# The axis of query heads has two dimensions, groups and heads of a group, and each grows at its end; with one dimension
# a new head would land in a neighbour's group. Every other axis is one dimension.
DIMENSIONS = {name: (name,) for name in AXES} | {"heads": ("kv_heads", "heads")}


class GrowthError(ValueError):
    """A growth that is impossible or does not keep its claim; the message names the leaf or the size."""


class Rule(NamedTuple):
    """How a parameter grows along one dimension.

    Attributes:
        fill: values of places without a source: "zero"; "fresh", as a new model is initialised; "mean" of the places
            with a source.
        weight: factor on copied entries, a number or a vector with one number for each new place.
        gradient: gradient of a copied entry divided by the gradient of its source; None: 1 / weight, for an entry that
            is the only copy of its source. First moments are multiplied by it, second moments by its square.
    """

    fill: str = "fresh"
    weight: Any = 1.0
    gradient: Any = None

    def moment_factor(self, power: int) -> Any:
        """Factor on a first moment (power 1) or a second moment (power 2)."""
        return self.weight**-power if self.gradient is None else self.gradient**power


class Dimension(NamedTuple):
    """A dimension that grows from `before` to `after` places.

    Attributes:
        source: (after,) the old place that each new place copies, -1 for none.
        copies: (after,) how many new places have the same source.
        share: (after,) share of each copy in the effect of its source; the shares of one source sum to 1.
    """

    name: str
    before: int
    after: int
    source: np.ndarray
    copies: np.ndarray
    share: Any
    old: ModelConfig
    new: ModelConfig

    @property
    def is_new(self) -> np.ndarray:
        """Boolean (after,): whether a place has no source."""
        return self.source < 0


Source = Callable[[int, int, ModelConfig, ModelConfig], np.ndarray]  # (before, after, old, new) -> source
RoleRule = Callable[[str, LeafAxes, Dimension], Rule]  # (role along the dimension, leaf, dimension) -> rule


class AxisRule(NamedTuple):
    """A family's rule for one dimension: the source of each place, and the Rule of each role."""

    source: Source
    rule: RoleRule


def at_the_end(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Sources of a dimension whose new places follow the old ones: 0 ... before-1, -1 ... -1."""
    return np.where(np.arange(after) < before, np.arange(after), -1)


def draw_share(source: np.ndarray, copies: np.ndarray, config: GrowthConfig, key: jax.Array | None) -> Any:
    """Share of each copy in the effect of its source, (size,); the shares of one source sum to 1.

    "equal" shares are 1 / n for a source with n copies. "unequal" shares are evenly spaced from (1 - t) / n to
    (1 + t) / n, with t drawn for each source from split_gap to 2 split_gap; their order is drawn too. Any two copies of
    a source therefore differ by 2 split_gap / (n (n - 1)) or more: copies with nearly equal shares get nearly equal
    gradients and stay twins. Example: with 2 copies and split_gap 0.4 the shares are 0.1 to 0.3 and 0.7 to 0.9.
    """
    if config.split == "equal" or copies.max() == 1:
        return 1.0 / copies
    assert key is not None, "unequal shares of copies are drawn: the growth needs a key"
    known, at = source >= 0, np.maximum(source, 0)
    order = np.argsort(source, kind="stable")
    earlier = np.empty_like(source)  # number of copies of the same source at earlier places
    earlier[order] = np.arange(len(source)) - np.searchsorted(source[order], source[order])
    # Drawn in float32, so that a certificate in float64 repeats the same growth; computed in the wider dtype.
    spread, turn = jax.random.uniform(key, (2, source.max() + 1), jnp.float32)
    t = config.split_gap * (1 + spread.astype(float)[at])
    turned = jnp.floor(turn[at] * copies).astype(int)
    place = (earlier + turned) % copies  # 0 to n - 1, another one for every copy
    share = (1 + t * (2 * place.astype(float) / np.maximum(copies - 1, 1) - 1)) / copies
    return jnp.where(known & (copies > 1), share, 1.0)


def dim_sizes(axis: str, config: ModelConfig, parts: int = 1) -> dict[str, int]:
    """Size of each dimension of an axis, by name, after every group of query heads was split into `parts`."""
    if axis == "heads":
        groups = config.kv_heads * parts
        return {"kv_heads": groups, "heads": config.num_heads // groups}
    return {axis: axis_sizes(config)[axis] * (parts if axis == "kv_heads" else 1)}


def leaf_dims(leaf: LeafAxes) -> list[tuple[str, str]]:
    """(axis, dimension) pairs of a leaf, in order; the axis of query heads has two dimensions."""
    return [(axis, dim) for axis in leaf.names for dim in DIMENSIONS[axis]]


def leaf_sizes(leaf: LeafAxes, config: ModelConfig, parts: int = 1) -> list[int]:
    """Sizes of a leaf's dimensions, in the order of leaf_dims."""
    return [size for axis in leaf.names for size in dim_sizes(axis, config, parts).values()]


def copy(x: jax.Array, sources: Mapping[int, np.ndarray]) -> jax.Array:
    """Array whose place j along dimension i is a copy of place sources[i][j] of `x`, or 0 if sources[i][j] is -1.

    All dimensions whose new places follow the old ones are extended by a single pad.
    """
    edges = [(0, 0, 0)] * x.ndim
    for i, source in sources.items():
        if np.array_equal(source, np.where(np.arange(len(source)) < x.shape[i], np.arange(len(source)), -1)):
            edges[i] = (0, len(source) - x.shape[i], 0)
        else:
            x = _copy_runs(x, i, source)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def _copy_runs(x: jax.Array, dim: int, source: np.ndarray) -> jax.Array:
    """Copy along `dim` with one pad for each run of adjacent sources: on a sharded array a pad moves blocks between
    neighbouring devices, while a gather moves everything."""
    size, places = x.shape[dim], len(source)
    starts = [
        j for j in range(places) if source[j] >= 0 and (j == 0 or source[j] != source[j - 1] + 1 or not source[j])
    ]
    if len(starts) > 64:  # interleaved layers; the layers axis is not sharded, so a gather is local
        taken = jnp.take(x, np.maximum(source, 0), axis=dim)
        return scale(taken, dim, (source >= 0).astype(np.float32))
    place = functools.partial(jax.lax.broadcasted_iota, jnp.int32, dimension=dim)
    out = jnp.zeros([places if i == dim else n for i, n in enumerate(x.shape)], x.dtype)
    for j in starts:
        end = next((i for i in range(j, places) if source[i] != source[j] + i - j), places)
        low = j - int(source[j])
        edges = [(0, 0, 0)] * x.ndim
        edges[dim] = (low, places - low - size, 0)  # a negative edge cuts
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
        in_run = (place(shape=padded.shape) >= j) & (place(shape=padded.shape) < end)
        out = jnp.where(in_run, padded, out)
    return out


def scale(x: jax.Array, dim: int, factor: float | np.ndarray | jax.Array) -> jax.Array:
    """Product of `x` with a number, or with a vector along `dim`."""
    if isinstance(factor, float | int):
        return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
    return x * jnp.asarray(factor, x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])


def fill(x: jax.Array, dim: int, is_new: np.ndarray, how: str, fresh: jax.Array | None) -> jax.Array:
    """`x` with the places along `dim` that have no source set to zero, to the mean of the others, or to `fresh`."""
    if not is_new.any():
        return x
    at_new = along(is_new, dim, x.ndim)
    if how == "zero":
        values: Any = jnp.zeros((), x.dtype)
    elif how == "mean":
        values = jnp.sum(jnp.where(at_new, 0, x), axis=dim, keepdims=True) / np.sum(~is_new)
    else:
        values = fresh
    return jnp.where(at_new, values, x)


def along(values: np.ndarray, dim: int, ndim: int) -> Any:
    """`values` (size,) as an array that broadcasts along `dim`; True at the end only is computed, not stored."""
    shape = [-1 if i == dim else 1 for i in range(ndim)]
    tail = int(np.argmax(values)) if values.any() else len(values)
    if np.array_equal(values, np.arange(len(values)) >= tail):
        shape[dim] = len(values)
        return jax.lax.broadcasted_iota(jnp.int32, shape, dim) >= tail
    return jnp.asarray(values).reshape(shape)
