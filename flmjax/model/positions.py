"""Rotary positions: RoPE (arXiv 2104.09864) and xPos (arXiv 2212.10554), on interleaved pairs (x0, x1), (x2, x3)..."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import ModelConfig


class Rotation(NamedTuple):
    """cos and sin for queries and keys, each (B or 1, L, 1, K): every pair's value twice, the sign of sin included."""

    query_cos: jax.Array
    query_sin: jax.Array
    key_cos: jax.Array
    key_sin: jax.Array


def rotation(config: ModelConfig, positions_BL: jax.Array) -> Rotation | None:
    """Rotation at `positions_BL` (tokens since the start of the document or sequence); None for learned positions.

    It is computed in at least float32, whatever the model's dtype: in bfloat16 positions above 256 coincide.
    xPos multiplies queries by s and keys by 1/s with s = zeta^((position - centre) / scale_base),
    zeta_i = (2i + 0.4 K) / (1.4 K). The centre is max_length // 2 for every sequence, so that cached keys stay valid.
    K is head_dim before it grew (rotary_dim); the dimensions added since do not turn, or repeat the first frequencies.
    """
    if not config.is_rotary:
        return None
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    K = config.rotated_dims
    even = np.arange(0, config.head_dim, 2)
    turns = even < K if not config.rotary_repeat else np.ones_like(even, bool)
    even_K = jnp.asarray(even % K, dtype)
    frequency = jnp.where(turns, config.rope_theta ** (-even_K / K), 0)
    angle = positions_BL[..., None].astype(dtype) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if config.position == "rope":
        query = key = (_pairs(cos, cos), _pairs(-sin, sin))
    else:
        zeta = jnp.where(turns, (even_K + 0.4 * K) / (1.4 * K), 1)
        power = (positions_BL[..., None].astype(dtype) - config.max_length // 2) / config.xpos_scale_base
        scale = zeta**power
        query = (_pairs(cos * scale, cos * scale), _pairs(-sin * scale, sin * scale))
        key = (_pairs(cos / scale, cos / scale), _pairs(-sin / scale, sin / scale))
    return Rotation(*query, *key)


def rotate(x_BLHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for every pair; the result has the dtype of x."""
    *front, head_dim = x_BLHK.shape
    swapped = jnp.flip(x_BLHK.reshape(*front, head_dim // 2, 2), axis=-1).reshape(x_BLHK.shape)
    return (x_BLHK * cos + swapped * sin).astype(x_BLHK.dtype)


def _pairs(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two (..., K/2) arrays interleaved to (..., 1, K); the axis of size 1 broadcasts over heads."""
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], 1, 2 * first.shape[-1])
