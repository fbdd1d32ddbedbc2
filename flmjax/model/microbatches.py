"""A batch computed in parts, one after another, so that the memory for activations is that of one part."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def in_parts(
    function: Callable[[Any, Any], tuple[Any, Any]], batch: Mapping[str, jax.Array], parts: int
) -> tuple[Any, Any]:
    """Apply `function` to each part of a batch in turn.

    Part j has the sequences j, j + parts, ..., so that each device keeps the sequences that it holds.

    Args:
        function: (part, number of the part) -> (arrays to be summed, arrays whose first axis is the sequences). The
            number is None if `parts` is 1.
        batch: arrays whose first axis is the sequences, a multiple of `parts`.

    Returns:
        The first results summed over the parts, and the second ones in the order of the batch's sequences.
    """
    if parts == 1:
        return function(batch, None)
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Any, part: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, sequences = function(*part)
        return jax.tree.map(jnp.add, total, sums), sequences

    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], split), 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, sequences = jax.lax.scan(body, zeros, (split, jnp.arange(parts)))
    return sums, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), sequences)
