"""What a growth rule is, and the operations on arrays that carry it out."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import ModelConfig
from flmjax.sharding.axes import AXES, LeafAxes, axis_sizes

# Query heads are groups x heads of a group: both grow at their own end, else a new head would land in a neighbour's
# group. Every other axis is one dimension.
DIMENSIONS = {name: (name,) for name in AXES} | {"heads": ("kv_heads", "heads")}


class GrowthError(ValueError):
    """A growth that cannot be, or that is not what it claims; names the leaf or the size."""


class Rule(NamedTuple):
    """What a leaf's entries become along one dimension.

    Attributes:
        fill: of places without a source: "zero"; "fresh", as a new model is initialised; "mean" of the others.
        weight: factor on copied entries, a number or one for each new place.
        gradient: factor that the gradient of a copied entry has against the gradient of its source; None: 1 / weight,
            as an entry has that alone stands for its source. Moments grow by it and by its square.
    """

    fill: str = "fresh"
    weight: Any = 1.0
    gradient: Any = None

    def moment_factor(self, power: int) -> Any:
        """Factor on a first (power 1) or second moment."""
        return self.weight**-power if self.gradient is None else self.gradient**power


class Dimension(NamedTuple):
    """A dimension that grows from `before` to `after` places.

    Attributes:
        source: (after,) the old place that each new place copies, -1 for none.
        copies: (after,) how many new places have the same source.
        share: (after,) of each copy in what its source did; sums to 1 over the copies of one source.
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
        """(after,) places without a source."""
        return self.source < 0


Source = Callable[[int, int, ModelConfig, ModelConfig], np.ndarray]  # (before, after, old, new) -> source
RoleRule = Callable[[str, LeafAxes, Dimension], Rule]  # (role along the dimension, leaf, dimension) -> rule


class AxisRule(NamedTuple):
    """A family's rule for one dimension."""

    source: Source
    rule: RoleRule


def at_the_end(before: int, after: int, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Old places first, new ones after them."""
    return np.where(np.arange(after) < before, np.arange(after), -1)


def draw_share(source: np.ndarray, copies: np.ndarray, split: str, key: jax.Array | None) -> Any:
    """Shares in (0.3, 0.7) of each other, 1 for a place that has one copy; equal ones make copies that never part."""
    if split == "equal" or copies.max() == 1:
        return 1.0 / copies
    assert key is not None, "unequal shares of copies are drawn: the growth needs a key"
    # Drawn in float32, so that a proof in float64 is of the same growth; divided in full, so that they sum to 1.
    drawn = jax.random.uniform(key, source.shape, jnp.float32, minval=0.3, maxval=0.7)
    drawn = jnp.where(copies == 1, 1.0, drawn.astype(float))
    known, at = source >= 0, np.maximum(source, 0)
    total = jnp.zeros(source.max() + 1).at[at].add(jnp.where(known, drawn, 0))[at]
    return jnp.where(known, drawn / total, 1.0)


def dim_sizes(axis: str, config: ModelConfig, parts: int = 1) -> dict[str, int]:
    """Dimensions of an axis and their sizes, every group of heads split into `parts`."""
    if axis == "heads":
        groups = config.kv_heads * parts
        return {"kv_heads": groups, "heads": config.num_heads // groups}
    return {axis: axis_sizes(config)[axis] * (parts if axis == "kv_heads" else 1)}


def leaf_dims(leaf: LeafAxes) -> list[tuple[str, str]]:
    """(axis, dimension) of a leaf in order; the query heads are two."""
    return [(axis, dim) for axis in leaf.names for dim in DIMENSIONS[axis]]


def leaf_sizes(leaf: LeafAxes, config: ModelConfig, parts: int = 1) -> list[int]:
    """Sizes of those dimensions."""
    return [size for axis in leaf.names for size in dim_sizes(axis, config, parts).values()]


def copy(x: jax.Array, sources: Mapping[int, np.ndarray]) -> jax.Array:
    """Place j along dimension i holds what place sources[i][j] held, 0 if that is -1.

    Old places first and new ones after them is one pad for all such dimensions.
    """
    edges = [(0, 0, 0)] * x.ndim
    for i, source in sources.items():
        if np.array_equal(source, np.where(np.arange(len(source)) < x.shape[i], np.arange(len(source)), -1)):
            edges[i] = (0, len(source) - x.shape[i], 0)
        else:
            x = _copy_runs(x, i, source)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def _copy_runs(x: jax.Array, dim: int, source: np.ndarray) -> jax.Array:
    """Each run of neighbours is a pad: sharded, it moves blocks between neighbours where a gather moves everything."""
    size, places = x.shape[dim], len(source)
    starts = [
        j for j in range(places) if source[j] >= 0 and (j == 0 or source[j] != source[j - 1] + 1 or not source[j])
    ]
    if len(starts) > 64:  # interleaved layers, which are not sharded
        taken = jnp.take(x, np.maximum(source, 0), axis=dim)
        return scale(taken, dim, (source >= 0).astype(np.float32))
    place = functools.partial(jax.lax.broadcasted_iota, jnp.int32, dimension=dim)
    out = jnp.zeros([places if i == dim else n for i, n in enumerate(x.shape)], x.dtype)
    for j in starts:
        end = next((i for i in range(j, places) if source[i] != source[j] + i - j), places)
        low = j - int(source[j])
        edges = [(0, 0, 0)] * x.ndim
        edges[dim] = (low, places - low - size, 0)  # negative ones cut
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
        here = (place(shape=padded.shape) >= j) & (place(shape=padded.shape) < end)
        out = jnp.where(here, padded, out)
    return out


def scale(x: jax.Array, dim: int, factor: Any) -> jax.Array:
    """X times a number or a vector along `dim`."""
    if isinstance(factor, float | int):
        return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
    return x * jnp.asarray(factor, x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])


def fill(x: jax.Array, dim: int, is_new: np.ndarray, how: str, fresh: jax.Array | None) -> jax.Array:
    """Set the places without a source; they hold zeros, or what an earlier dimension put there."""
    if not is_new.any():
        return x
    here = along(is_new, dim, x.ndim)
    if how == "zero":
        values: Any = jnp.zeros((), x.dtype)
    elif how == "mean":
        values = jnp.sum(jnp.where(here, 0, x), axis=dim, keepdims=True) / np.sum(~is_new)
    else:
        values = fresh
    return jnp.where(here, values, x)


def along(values: np.ndarray, dim: int, ndim: int) -> Any:
    """(size,) as an array that broadcasts along `dim`; for a mask that is a tail, without storing it."""
    shape = [-1 if i == dim else 1 for i in range(ndim)]
    tail = int(np.argmax(values)) if values.any() else len(values)
    if np.array_equal(values, np.arange(len(values)) >= tail):
        shape[dim] = len(values)
        return jax.lax.broadcasted_iota(jnp.int32, shape, dim) >= tail
    return jnp.asarray(values).reshape(shape)
