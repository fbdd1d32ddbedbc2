"""The learned family: growth matrices tuned by gradient, after LiGO (arXiv 2303.00980).

The new parameters are linear in the old parameters: along each dimension a matrix maps old places to new places, and
all leaves in which the dimension has the same role share it. The matrices start as the map of the zero family, so that
the start is exact. They are then tuned on the training loss while the old parameters stay fixed. At the end the new
parameters are computed from them, and the matrices are discarded.

Sharded, each update gathers the parameters of one layer at a time, and the rows of one shard of the vocabulary, as
training does; each device receives about 1.7 times the bytes of the new parameters at each update.
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
from flmjax.sharding.axes import LeafAxes, Params, map_with_axes

NOT_LEARNED = ("vocab", "length")  # old words say nothing about a new word, and the matrix would be huge
Matrices = dict[str, jax.Array]  # "dimension.role" -> (after, before)
Batch = dict[str, jax.Array]


def tune(
    params: Params,
    growth: Growth,
    value_and_grad: Callable[[Params, Batch], tuple[jax.Array, Params]],
    batches: Iterable[Batch],
    shardings: Params | None = None,
) -> tuple[Params, list[float]]:
    """Grow by matrices that are tuned with Adam, one update for each batch.

    Args:
        params: parameters of the old model; they do not change.
        value_and_grad: (parameters of the new model, batch) -> (mean loss, its gradient).
        batches: batches of training data on the devices.
        shardings: shardings of the new parameters; None on one device.

    Returns:
        Parameters of the new model, and the loss at every update.
    """

    def pinned(grown: Params) -> Params:
        return grown if shardings is None else jax.lax.with_sharding_constraint(grown, shardings)

    optimizer = optax.adam(growth.config.tuning_learning_rate)
    matrices = first_matrices(growth)
    constant = jax.jit(lambda key: pinned(fresh_part(dataclasses.replace(growth, key=key))))(growth.key)
    expanded = jax.jit(lambda matrices, params, constant: pinned(expand(matrices, params, constant, growth)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(matrices: Matrices, opt_state: optax.OptState, params: Params, constant: Params, batch: Batch) -> Any:
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
    """Initial growth matrices: the zero family's map from old places to new places, as dense float32 matrices."""
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


def fresh_part(growth: Growth) -> Params:
    """Fresh entries of the new parameters, which the zero family adds to the linear map: the growth of zeros."""
    assert growth.key is not None

    def grow_zeros(path: str, leaf: LeafAxes, x: jax.ShapeDtypeStruct, fresh: jax.Array) -> jax.Array:
        return growth.grow_leaf(path, leaf, jnp.zeros(x.shape, x.dtype), fresh)

    shapes, axes = abstract_params(growth.old)
    fresh_params: Params = map_with_axes(grow_zeros, axes, shapes, init_params(growth.new, growth.key))
    return fresh_params


def expand(matrices: Matrices, params: Params, constant: Params, growth: Growth) -> Params:
    """Parameters of the new model: the matrices applied to the old parameters, plus `constant` (see fresh_part)."""
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
            # Products gather a sharded dimension; the loop over layers keeps that to one layer at a time.
            out = multiply(leaf, out, [step for step in steps if step[0] == 0])
            inner = [(i - 1, axis, dim) for i, axis, dim in steps if i > 0]
            out = jax.lax.map(lambda layer: multiply(leaf, layer, inner), out) if inner else out
        else:
            out = multiply(leaf, out, steps)
        return out.reshape(constant.shape) + constant

    new_params: Params = map_with_axes(expand_one, abstract_params(growth.old)[1], params, constant)
    return new_params


def tuning_flops(growth: Growth) -> float:
    """FLOPs of the growth matrices in one update: computing the new parameters (forward), and twice as many backward.

    The model FLOPs of the new model are not included.
    """
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
