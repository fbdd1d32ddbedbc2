"""Next-token cross-entropy as a (sum, weight) pair: sums add up over microbatches and devices, means do not."""

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
    model = Transformer(config, placement, deterministic=dropout_key is None)
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


def cross_entropy_sum(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    config: ModelConfig,
    placement: Any = None,
) -> jax.Array:
    """sum of weight * (logsumexp(logits) - logits[target]); logits = x table^T in at least float32."""
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    logits_BLV = jnp.einsum("bld,vd->blv", x_BLD, table_VD, preferred_element_type=dtype)
    logits_BLV = mask_padding(pin(placement, logits_BLV, "batch", None, "vocab"), config)
    top_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BL * (top_BL - target_BL))
