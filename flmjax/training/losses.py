"""Next-token cross-entropy as a (sum, weight) pair: sums add up over microbatches and devices, means do not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flmjax.config import ModelConfig
from flmjax.model.layers import pin
from flmjax.model.transformer import Transformer, mask_padding


def loss_sums(
    params: Any,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    placement: Any = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats, summed over the weighted targets of a batch.

    Args:
        params: of Transformer(config).
        batch: tokens, targets int (B, L), weights (B, L); segment_ids, positions (B, L) where documents are kept apart;
            bytes (B,) of text that the row's weighted targets stand for.
        dropout_key: None switches dropout off.

    Returns:
        The sum and {"loss": the sum, "weight": of the targets, "bytes"}; at least float32, whatever the dtype.
    """
    model: Any = Transformer(config, placement, deterministic=dropout_key is None)
    x_BLD, table_VD = model.apply(
        {"params": params},
        batch["tokens"],
        batch.get("segment_ids"),
        batch.get("positions"),
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="features",
    )
    loss = cross_entropy_sum(x_BLD, table_VD, batch["targets"], batch["weights"], config, placement)
    return loss, {"loss": loss, "weight": jnp.sum(batch["weights"]), "bytes": jnp.sum(batch["bytes"])}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    config: ModelConfig,
    placement: Any = None,
) -> jax.Array:
    """sum of weight * (logsumexp(logits) - logits[target]); logits = x table^T in at least float32.

    The gradient of a sum is known as soon as its logits are, so the forward pass of a derivative computes it at once,
    for one part of the sequence after another: the logits are never stored and never computed twice.
    """
    total, _ = _over_chunks(x_BLD, table_VD, targets_BL, weights_BL, config, placement, derivative=False)
    return total


def _forward(
    x: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, config: Any, placement: Any
) -> Any:
    return _over_chunks(x, table, targets, weights, config, placement, derivative=True)


def _backward(config: Any, placement: Any, gradients: tuple[jax.Array, jax.Array], scale: jax.Array) -> Any:
    dx_BLD, dtable_VD = gradients
    return (dx_BLD * scale).astype(dx_BLD.dtype), (dtable_VD * scale).astype(config.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def _over_chunks(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    config: ModelConfig,
    placement: Any,
    derivative: bool,
) -> tuple[jax.Array, Any]:
    """(sum, (gradient of x, gradient of the table) or Nones), C parts of the length one after another."""
    chunks = _num_chunks(x_BLD.shape[0], x_BLD.shape[1], table_VD.shape[0], placement)

    def split(x_BL: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], chunks, -1, *x_BL.shape[2:]), 1, 0)

    def body(totals: tuple[jax.Array, Any], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, Any], Any]:
        x_BLD, targets_BL, weights_BL = part
        loss, dx, dtable_DV = _chunk(x_BLD, targets_BL, weights_BL, table_VD, config, placement, derivative)
        return (totals[0] + loss, totals[1] + dtable_DV if derivative else None), dx

    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    start: Any = (jnp.zeros((), dtype), jnp.zeros(table_VD.shape[::-1], dtype) if derivative else None)
    parts = (split(x_BLD), split(targets_BL), split(weights_BL))
    (total, dtable_DV), dx = jax.lax.scan(body, start, parts)
    if not derivative:
        return total, None
    return total, (jnp.moveaxis(dx, 0, 1).reshape(x_BLD.shape), dtable_DV.T)


def _chunk(
    x_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    table_VD: jax.Array,
    config: ModelConfig,
    placement: Any,
    derivative: bool,
) -> tuple[jax.Array, Any, Any]:
    """Loss sum of some places and its gradients by x and table: (softmax - one-hot) * weight times the other factor."""
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    logits_BLV = jnp.einsum("bld,vd->blv", x_BLD, table_VD, preferred_element_type=dtype)
    logits_BLV = mask_padding(pin(placement, logits_BLV, "batch", None, "vocab"), config)
    top_BL1 = jnp.max(logits_BLV, axis=-1, keepdims=True)
    exp_BLV = jnp.exp(logits_BLV - top_BL1)
    sum_BL1 = jnp.sum(exp_BLV, axis=-1, keepdims=True)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    loss = jnp.sum(weights_BL * (jnp.log(sum_BL1) + top_BL1)[..., 0] - weights_BL * target_BL)
    if not derivative:
        return loss, None, None
    is_target_BLV = jnp.arange(table_VD.shape[0]) == targets_BL[..., None]
    weights_BL1 = weights_BL[..., None].astype(dtype)
    d_BLV = (exp_BLV * (weights_BL1 / sum_BL1) - jnp.where(is_target_BLV, weights_BL1, 0)).astype(x_BLD.dtype)
    # Made once: fused into both products below, it would be computed for each of their tiles.
    d_BLV = jax.lax.optimization_barrier(pin(placement, d_BLV, "batch", None, "vocab"))
    dx_BLD = pin(placement, jnp.einsum("blv,vd->bld", d_BLV, table_VD), "batch", None, None)
    dtable_DV = jnp.einsum("bld,blv->dv", x_BLD, d_BLV).astype(dtype)
    return loss, dx_BLD, pin(placement, dtable_DV, None, "vocab")


def _num_chunks(rows: int, length: int, vocabulary: int, placement: Any) -> int:
    """Parts of the length, each of at most 2^21 logits: small enough for a cache. On several devices one part: every
    part's table gradient is a sum over all of them."""
    if placement is not None and placement.mesh.size > 1:
        return 1
    wanted = -(-rows * length * vocabulary // 2**21)
    return next(n for n in range(min(max(wanted, 1), length), length + 1) if length % n == 0)
