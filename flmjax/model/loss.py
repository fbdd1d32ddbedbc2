"""Next-token cross-entropy as a sum and its weight: sums add up over microbatches and devices, means do not.

Both objectives of FreeLM (arXiv 2305.01616) are this loss. The sequence of a teacher has weights on its marks alone,
"true" or "false"; the model judges correctly if the correct mark has the larger logit of the two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from flmjax.config import ModelConfig
from flmjax.model.attention import MASKED
from flmjax.model.layers import operands_of_float32_sum
from flmjax.model.transformer import Transformer, cast_table, scattered_sum
from flmjax.sharding.axes import Params
from flmjax.sharding.rules import Placement, constrain, platform_of

# Most logits of a chunk on a device.
LOGITS = {"cpu": 2**21, "accelerator": 2**28}


def loss_sums(
    params: Params,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    placement: Placement | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats, summed over the weighted targets of a batch.

    Args:
        params: parameters of Transformer(config).
        batch: arrays of a Batch (flmjax.data.batch) on the devices.
        dropout_key: None switches dropout off.

    Returns:
        The sum that training minimises, in at least float32: cross-entropy plus config.z_loss. And a dictionary of sums
        over all sequences: "loss" (cross-entropy alone), "weight" of the targets, "bytes" of text; if the batch has
        marks, also the sums of `teacher_sums`.
    """
    x_BLD, table_VD = _features(params, batch, config, placement, dropout_key)
    objective, loss_B = training_sum(x_BLD, table_VD, batch["targets"], batch["weights"], config, placement)
    sums = {"loss": jnp.sum(loss_B), "weight": jnp.sum(batch["weights"]), "bytes": jnp.sum(batch["bytes"])}
    if "marks" in batch:
        sums |= teacher_sums(x_BLD, table_VD, loss_B, batch, placement)
    return objective, sums


def source_sums(
    params: Params,
    batch: dict[str, jax.Array],
    source_B: jax.Array,
    num_sources: int,
    config: ModelConfig,
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Sums over the sequences of each of S sources, without dropout, for evaluation.

    Args:
        params: parameters of Transformer(config).
        batch: arrays of a Batch (flmjax.data.batch) on the devices.
        source_B: source of each sequence, int32 (B,), 0 to S - 1.
        num_sources: S.

    Returns:
        Arrays (S,): "loss" in nats, "weight" of the targets, "bytes" of text; if the batch has marks, also "judged",
        the number of decisive targets with a weight, and "correct", as in teacher_sums.
    """
    x_BLD, table_VD = _features(params, batch, config, placement)
    _, loss_B = training_sum(x_BLD, table_VD, batch["targets"], batch["weights"], config, placement)
    sums_B = {"loss": loss_B, "weight": jnp.sum(batch["weights"], axis=1), "bytes": batch["bytes"]}
    if "marks" in batch:
        judged_BL, correct_BL = _judgements(x_BLD, table_VD, batch, placement)
        sums_B |= {"judged": jnp.sum(judged_BL, axis=1), "correct": jnp.sum(judged_BL & correct_BL, axis=1)}
    is_of_source_BS = source_B[:, None] == jnp.arange(num_sources)
    return {name: jnp.sum(jnp.where(is_of_source_BS, x_B[:, None], 0), axis=0) for name, x_B in sums_B.items()}


def _features(
    params: Params,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    placement: Placement | None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """States (B, L, D) and the float32 table (V, D); see Transformer.features."""
    model: Any = Transformer(config, placement, deterministic=dropout_key is None)
    return model.apply(
        {"params": params},
        batch["tokens"],
        batch.get("segment_ids"),
        batch.get("positions"),
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="features",
    )


def token_cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every target (B, L) in nats, and the log-probabilities (B, L, V) of all ids."""
    log_probs_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
    return -jnp.take_along_axis(log_probs_BLV, targets_BL[..., None], axis=-1)[..., 0], log_probs_BLV


def divisor(weight: jax.Array) -> jax.Array:
    """`weight` as the divisor of a weighted sum; 1 if the weight is 0, since the sum is 0 too."""
    return jnp.where(weight > 0, weight, 1.0)


def teacher_sums(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    loss_B: jax.Array,
    batch: dict[str, jax.Array],
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """Sums that a batch with teachers has besides loss, weight and bytes; they have no gradient.

    Returns:
        "language_loss", "language_weight", "teacher_loss", "teacher_weight": loss in nats and weight of the sequences
        of text and of the sequences of teachers. "judged": number of decisive targets with a weight. "correct": number
        of judged targets whose mark has the larger logit of the two (equal logits are wrong).
    """
    marks_B2, weight_B = batch["marks"], jnp.sum(batch["weights"], axis=1)
    is_teacher_B = marks_B2[:, 0] != marks_B2[:, 1]
    judged_BL, correct_BL = _judgements(x_BLD, table_VD, batch, placement)
    # Each kind is summed by itself: without teachers the rounding error of "all - text" would look like a loss.
    return {
        "language_loss": jnp.sum(loss_B, where=~is_teacher_B),
        "language_weight": jnp.sum(weight_B, where=~is_teacher_B),
        "teacher_loss": jnp.sum(loss_B, where=is_teacher_B),
        "teacher_weight": jnp.sum(weight_B, where=is_teacher_B),
        "judged": jnp.sum(judged_BL),
        "correct": jnp.sum(judged_BL & correct_BL),
    }


def _judgements(
    x_BLD: jax.Array, table_VD: jax.Array, batch: dict[str, jax.Array], placement: Placement | None
) -> tuple[jax.Array, jax.Array]:
    """Whether each target (B, L) is judged, and whether its mark has the larger logit; see teacher_sums."""
    judged_BL = (batch["decisive"] > 0) & (batch["weights"] > 0)
    for_true_BL = _logit_difference(x_BLD, table_VD, batch["marks"], placement)
    correct_BL = jnp.where(batch["targets"] == batch["marks"][:, :1], for_true_BL > 0, for_true_BL < 0)
    return judged_BL, correct_BL


def teacher_means(sums: dict[str, Any]) -> dict[str, Any]:
    """Means of a batch with teachers, each divided by the weight of its kind; NaN if that weight is 0.

    Args:
        sums: the sums of `loss_sums`, of one batch or of several, as JAX or NumPy numbers (a Python float cannot be
            divided by 0).

    Returns:
        "language_loss" and "teacher_loss" in nats a token, "bits_per_byte" of the sequences of text, and
        "judgement_accuracy", the share of judged targets that are correct, 0 to 1.
    """
    return {
        "language_loss": sums["language_loss"] / sums["language_weight"],
        "teacher_loss": sums["teacher_loss"] / sums["teacher_weight"],
        "bits_per_byte": sums["language_loss"] / math.log(2) / sums["bytes"],
        "judgement_accuracy": sums["correct"] / sums["judged"],
    }


def _logit_difference(
    x_BLD: jax.Array, table_VD: jax.Array, marks_B2: jax.Array, placement: Placement | None
) -> jax.Array:
    """Logit of a sequence's first mark minus the logit of its second mark (B, L), in at least float32.

    Only the two rows of the table that belong to the marks are multiplied.
    """
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    x_BLD, table_VD = jax.lax.stop_gradient((x_BLD, table_VD))
    # Pinned like the embedding's lookup: every vocab shard looks up the rows that it holds, and no table is gathered.
    rows_B2D = cast_table(table_VD, x_BLD.dtype, placement)[marks_B2]
    marks_B2D = constrain(placement, rows_B2D, "batch", None, None).astype(dtype)
    # A sum of products, not a matrix multiplication: an accelerator would round the float32 factors of that.
    return jnp.sum(x_BLD.astype(dtype) * (marks_B2D[:, :1] - marks_B2D[:, 1:]), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def training_sum(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    config: ModelConfig,
    placement: Placement | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum that training minimises, and the cross-entropy of each sequence (B,), which has no gradient.

    Both are sums of weight * (logsumexp(logits) - logits[target]); the first one has also the terms
    weight * config.z_loss * logsumexp(logits)^2 (PaLM, arXiv 2204.02311, section 5), which keep log Z near 0.
    logits = x table^T in at least float32; the float32 table is cast to the dtype of x first.

    The gradient of a sum needs nothing but the logits. The forward pass of a derivative therefore computes it too,
    chunk by chunk along the length: the logits are never stored and never computed twice.
    """
    return _over_chunks(x_BLD, table_VD, targets_BL, weights_BL, config, placement, derivative=False)[0]


def _forward(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    config: ModelConfig,
    placement: Placement | None,
) -> Any:
    return _over_chunks(x, table, targets, weights, config, placement, derivative=True)


def _backward(
    config: ModelConfig,
    placement: Placement | None,
    gradients: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array, jax.Array],
) -> Any:
    (dx_BLD, dtable_VD), (scale, _) = gradients, scales
    return (dx_BLD * scale).astype(dx_BLD.dtype), dtable_VD * scale, None, None


training_sum.defvjp(_forward, _backward)


def _over_chunks(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    config: ModelConfig,
    placement: Placement | None,
    derivative: bool,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """((sum to minimise, cross-entropies (B,)), (gradient of x, gradient of the table) or None).

    All are computed chunk by chunk along the length.
    """
    table_VD = cast_table(table_VD, config.dtype, placement)
    arguments = x_BLD, table_VD, targets_BL, weights_BL
    if placement is None or placement.mesh.size == 1:
        loss_B, z_loss_B, gradients = _local_sums(*arguments, config, placement, derivative)
    else:
        loss_B, z_loss_B, gradients = _sharded_sums(arguments, config, placement, derivative)
    return (jnp.sum(loss_B) if z_loss_B is None else jnp.sum(loss_B + z_loss_B), loss_B), gradients


def _sharded_sums(
    arguments: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    config: ModelConfig,
    placement: Placement,
    derivative: bool,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """The result of _local_sums of all devices; each one has its sequences and its part of the vocabulary.

    A device sums its chunks' gradients of the table; their sum over the devices is computed once and scattered.
    """
    local = dataclasses.replace(placement, is_local=True)

    def sums(x_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array) -> Any:
        loss_B, z_loss_B, gradients = _local_sums(x_BLD, table_VD, targets_BL, weights_BL, config, local, derivative)
        if derivative:
            gradients = gradients[0], scattered_sum(gradients[1], placement)
        return loss_B, z_loss_B, gradients

    batch, table = placement.spec("batch"), placement.spec("vocab")
    gradients = (batch, P(*table, "fsdp")) if derivative else None
    sharded = jax.shard_map(
        sums,
        mesh=placement.mesh,
        in_specs=(batch, table, batch, batch),
        out_specs=(batch, batch if config.z_loss else None, gradients),
        check_vma=False,
    )
    result: tuple[jax.Array, jax.Array | None, Any] = sharded(*arguments)
    return result


def _local_sums(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    config: ModelConfig,
    placement: Placement | None,
    derivative: bool,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """(cross-entropies (B,), z-losses (B,) or None, (gradient of x, gradient of the table) or None)."""
    chunks = _num_chunks(x_BLD.shape[0], x_BLD.shape[1], table_VD.shape[0], placement)

    def split(x_BL: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], chunks, -1, *x_BL.shape[2:]), 1, 0)

    def body(totals: tuple[Any, Any], part: tuple[jax.Array, ...]) -> tuple[tuple[Any, Any], Any]:
        x_BLD, targets_BL, weights_BL = part
        losses, dx, dtable_DV = _chunk(x_BLD, targets_BL, weights_BL, table_VD, config, placement, derivative)
        return (jax.tree.map(jnp.add, totals[0], losses), totals[1] + dtable_DV if derivative else None), dx

    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    zeros_B = jnp.zeros(len(x_BLD), dtype)
    start: Any = (
        (zeros_B, zeros_B if config.z_loss else None),
        jnp.zeros(table_VD.shape[::-1], dtype) if derivative else None,
    )
    ((loss_B, z_loss_B), dtable_DV), dx = jax.lax.scan(
        body, start, (split(x_BLD), split(targets_BL), split(weights_BL))
    )
    if not derivative:
        return loss_B, z_loss_B, None
    return loss_B, z_loss_B, (jnp.moveaxis(dx, 0, 1).reshape(x_BLD.shape), dtable_DV.T)


def _chunk(
    x_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    table_VD: jax.Array,
    config: ModelConfig,
    placement: Placement | None,
    derivative: bool,
) -> tuple[tuple[jax.Array, jax.Array | None], Any, Any]:
    """((cross-entropies (B,), z-losses (B,) or None), gradient of x, gradient of the table, transposed) of one chunk.

    The gradient with respect to the logits is d = (softmax * (1 + 2 z_loss logsumexp) - one-hot) * weight; x and the
    table get d times the other.
    """
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    is_local = placement is not None and placement.is_local

    def over_vocabulary(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        return reduce(x, "tensor") if is_local else x

    assert config.vocab_size is not None
    size = table_VD.shape[0]  # of the part of the vocabulary that this device has
    first = jax.lax.axis_index("tensor") * size if is_local else 0
    logits_BLV = jnp.einsum("bld,vd->blv", x_BLD, table_VD, preferred_element_type=dtype)
    if config.padded_vocab_size != config.vocab_size:
        logits_BLV = jnp.where(first + jnp.arange(size) < config.vocab_size, logits_BLV, MASKED)
    top_BL1 = over_vocabulary(jax.lax.pmax, jnp.max(logits_BLV, axis=-1, keepdims=True))
    exp_BLV = jnp.exp(logits_BLV - top_BL1)
    sum_BL1 = over_vocabulary(jax.lax.psum, jnp.sum(exp_BLV, axis=-1, keepdims=True))
    places_BL1 = targets_BL[..., None] - first
    target_BL1 = jnp.take_along_axis(logits_BLV, jnp.clip(places_BL1, 0, size - 1) if is_local else places_BL1, axis=-1)
    if is_local:
        is_inside_BL1 = (places_BL1 >= 0) & (places_BL1 < size)
        target_BL1 = jax.lax.psum(jnp.where(is_inside_BL1, target_BL1, 0), "tensor")
    log_sum_BL1 = jnp.log(sum_BL1) + top_BL1
    loss_B = jnp.sum(weights_BL * log_sum_BL1[..., 0] - weights_BL * target_BL1[..., 0], axis=1)
    z_loss_B = config.z_loss * jnp.sum(weights_BL * jnp.square(log_sum_BL1[..., 0]), axis=1) if config.z_loss else None
    if not derivative:
        return (loss_B, z_loss_B), None, None
    is_target_BLV = jnp.arange(size) == places_BL1
    weights_BL1 = weights_BL[..., None].astype(dtype)
    slope_BL1 = weights_BL1 * (1 + 2 * config.z_loss * log_sum_BL1) if config.z_loss else weights_BL1
    d_BLV = (exp_BLV * (slope_BL1 / sum_BL1) - jnp.where(is_target_BLV, weights_BL1, 0)).astype(x_BLD.dtype)
    # The barrier makes XLA compute it once: fused into both products below, it would be computed again for each tile.
    d_BLV = jax.lax.optimization_barrier(d_BLV)
    dx_BLD = over_vocabulary(jax.lax.psum, jnp.einsum("blv,vd->bld", d_BLV, table_VD))
    factors = operands_of_float32_sum(placement, x_BLD, d_BLV)
    return (loss_B, z_loss_B), dx_BLD, jnp.einsum("bld,blv->dv", *factors, preferred_element_type=dtype)


def _num_chunks(rows: int, length: int, vocabulary: int, placement: Placement | None) -> int:
    """Number of chunks of the length, each of at most LOGITS logits a device (on CPUs, as many as fit in a cache)."""
    most = LOGITS["cpu" if platform_of(placement) == "cpu" else "accelerator"]
    enough = -(-rows * length * vocabulary // most)
    return next(n for n in range(min(max(enough, 1), length), length + 1) if length % n == 0)
