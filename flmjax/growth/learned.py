"""The learned family: growth matrices tuned by gradient. After LiGO (arXiv 2303.00980).

Growth is linear in the old parameters: along each dimension a matrix maps old places to new ones, shared by all leaves
that meet the dimension in the same way. The matrices start as the zero family's, so that the start is exact, and are
then tuned on the training loss, old parameters fixed. What they make is the grown model; they are gone afterwards.

Sharded, each update gathers matrices of one layer at a time, and the rows of a shard of the vocabulary, as training
does; each device receives about 1.7 times the bytes of the new parameters at each update.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flmjax.growth.growth import Growth
from flmjax.growth.rules import copy, leaf_dims, leaf_sizes
from flmjax.model.transformer import abstract_params, init_params
from flmjax.sharding.axes import LeafAxes, map_with_axes

NOT_LEARNED = ("vocab", "length")  # no old word says what a new one means, and the matrix would be huge
Matrices = dict[str, jax.Array]  # "dimension.role" -> (after, before)


def tune(
    params: Any,
    growth: Growth,
    value_and_grad: Callable[[Any, Any], tuple[jax.Array, Any]],
    batches: Iterable[Any],
    shardings: Any = None,
) -> tuple[Any, list[float]]:
    """Grow by matrices tuned with Adam, one update for each batch.

    Args:
        params: of the old model; not changed.
        value_and_grad: (parameters of the new model, batch) -> (mean loss, its gradient).
        shardings: of the new parameters; None on one device.

    Returns:
        Parameters of the new model, and the loss at every update.
    """

    def pinned(grown: Any) -> Any:
        return grown if shardings is None else jax.lax.with_sharding_constraint(grown, shardings)

    optimizer = optax.adam(growth.config.tuning_learning_rate)
    matrices = first_matrices(growth)
    constant = jax.jit(lambda key: pinned(fresh_part(dataclasses.replace(growth, key=key))))(growth.key)
    expanded = jax.jit(lambda matrices, params, constant: pinned(expand(matrices, params, constant, growth)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(matrices: Matrices, opt_state: Any, params: Any, constant: Any, batch: Any) -> Any:
        grown, pull_back = jax.vjp(lambda matrices: pinned(expand(matrices, params, constant, growth)), matrices)
        value, grads = value_and_grad(grown, batch)
        updates, opt_state = optimizer.update(pull_back(grads)[0], opt_state, matrices)
        return optax.apply_updates(matrices, updates), opt_state, value

    opt_state, losses = optimizer.init(matrices), []
    for batch in batches:
        matrices, opt_state, value = update(matrices, opt_state, params, constant, batch)
        losses.append(value)
    return expanded(matrices, params, constant), [float(value) for value in losses]


def first_matrices(growth: Growth) -> Matrices:
    """The zero family's map of old places, as dense float32 matrices."""
    matrices: Matrices = {}

    def add(path: str, leaf: LeafAxes) -> None:
        for i, d, rule in growth.rules_of(path, leaf):
            if d.name in NOT_LEARNED:
                continue
            matrix = np.zeros((d.after, d.before), np.float32)
            matrix[np.arange(d.after)[~d.is_new], d.source[~d.is_new]] = rule.weight
            if rule.fill == "mean":
                matrix[d.is_new] = 1 / d.before
            matrices[f"{d.name}.{leaf.role(leaf_dims(leaf)[i][0])}"] = jnp.asarray(matrix)

    map_with_axes(add, abstract_params(growth.old)[1])
    return matrices


def fresh_part(growth: Growth) -> Any:
    """What the zero family adds to the linear map: growth of zeros."""
    assert growth.key is not None

    def grow_zeros(path: str, leaf: LeafAxes, x: Any, fresh: jax.Array) -> jax.Array:
        return growth.grow_leaf(path, leaf, jnp.zeros(x.shape, x.dtype), fresh)

    shapes, axes = abstract_params(growth.old)
    return map_with_axes(grow_zeros, axes, shapes, init_params(growth.new, growth.key))


def expand(matrices: Matrices, params: Any, constant: Any, growth: Growth) -> Any:
    """The parameters of the new model that the matrices compute from those of the old one."""
    dimensions, parts = growth.dimensions, growth.split

    def multiply(leaf: LeafAxes, x: jax.Array, steps: list[tuple[int, str, str]]) -> jax.Array:
        for i, axis, dim in steps:
            if dim in NOT_LEARNED:
                x = copy(x, {i: dimensions[dim].source})
            else:
                x = jnp.moveaxis(jnp.tensordot(matrices[f"{dim}.{leaf.role(axis)}"], x, axes=(1, i)), 0, i)
        return x

    def expand_one(path: str, leaf: LeafAxes, x: jax.Array, constant: jax.Array) -> jax.Array:
        if "kv_heads" in leaf.names and parts > 1:
            x = jnp.repeat(x, parts, axis=leaf.names.index("kv_heads"))
        out = x.reshape(leaf_sizes(leaf, growth.old, parts))
        steps = [(i, axis, dim) for i, (axis, dim) in enumerate(leaf_dims(leaf)) if dim in dimensions]
        if leaf.names[0] == "layers":
            # A sharded dimension is gathered for its product: of one layer at a time.
            out = multiply(leaf, out, [step for step in steps if step[0] == 0])
            inner = [(i - 1, axis, dim) for i, axis, dim in steps if i > 0]
            out = jax.lax.map(lambda layer: multiply(leaf, layer, inner), out) if inner else out
        else:
            out = multiply(leaf, out, steps)
        return out.reshape(constant.shape) + constant

    return map_with_axes(expand_one, abstract_params(growth.old)[1], params, constant)


def tuning_flops(growth: Growth) -> float:
    """FLOPs of one update beyond the new model's own: making its parameters, forward and twice backward."""
    total = 0.0

    def add(path: str, leaf: LeafAxes) -> None:
        nonlocal total
        sizes, after = leaf_sizes(leaf, growth.old, growth.split), leaf_sizes(leaf, growth.new)
        for i, (_, dim) in enumerate(leaf_dims(leaf)):
            if dim in growth.dimensions and dim not in NOT_LEARNED:
                total += 3 * 2 * math.prod(sizes) * after[i]
            sizes[i] = after[i]

    map_with_axes(add, abstract_params(growth.old)[1])
    return total
