"""Causal attention behind one function. Every backend honours segment ids or refuses them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import ConfigError, ModelConfig, RunConfig, nearest
from flmjax.sharding.rules import Placement, platform_of

# Score of a key that the query must not see. It is finite, so that no query has -inf scores alone (NaN after softmax).
MASKED = -1e30
# Splash attention computes in blocks of tokens; the smallest is a TPU's number of lanes.
SPLASH_BLOCKS = (512, 256, 128)


def attend(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segment_ids_BL: jax.Array | None,
    *,
    implementation: str,
    placement: Placement | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the query's position and the earlier positions of its segment.

    H query heads share G key heads: query head h uses key head h // (H / G).

    Args:
        q_BLHK: queries, positions applied. k_BLGK, v_BLGK: keys and values.
        segment_ids_BL: number of the document that each token of a packed sequence belongs to, or None.
        implementation: "plain", "cudnn" (GPU), "splash" (TPU; on other platforms interpreted, which is slow), or
            "fused", for which `choose` decides.
        placement: the activations' sharding (sharding.rules.Placement); splash runs under a shard_map over its mesh.

    Returns:
        (B, L, H, K) in the queries' dtype.

    Raises:
        ConfigError: for an unknown backend, or one that cannot honour segment ids or the length.
    """
    if implementation == "fused":
        length, is_segmented = q_BLHK.shape[1], segment_ids_BL is not None
        implementation = choose(platform_of(placement), q_BLHK.dtype, is_segmented, length)
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"attention='{implementation}'{nearest(implementation, ('fused', *IMPLEMENTATIONS))}")
    return IMPLEMENTATIONS[implementation](q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, placement)


def choose(platform: str, dtype: str | np.dtype[Any], segmented: bool, length: int) -> str:
    """Name of the backend that "fused" stands for.

    Args:
        platform: "tpu", "gpu" or "cpu". dtype: dtype of the queries. segmented: whether there are segment ids.
        length: number of tokens; splash needs a multiple of 128.
    """
    if platform == "tpu" and length % SPLASH_BLOCKS[-1] == 0:
        return "splash"
    if platform == "gpu" and not segmented and jnp.dtype(dtype).itemsize == 2:  # cuDNN's kernels are for 16 bits
        return "cudnn"
    return "plain"


def with_plain_attention(config: ModelConfig) -> ModelConfig:
    """The model for sequences of any length on any platform: same parameters, attention without a fused kernel."""
    return dataclasses.replace(config, attention="plain")


def check_backends(config: RunConfig, platform: str) -> None:
    """Refuse a run with a stage whose cuDNN attention cannot compute on the devices, or in the model's dtype.

    Raises:
        ConfigError: naming the setting.
    """
    for stage in config.schedule:
        if stage.layout.attention != "cudnn":
            continue
        setting, dtype = stage.setting_of("attention"), stage.model.dtype
        if platform != "gpu":
            raise ConfigError(f"{setting}='cudnn' needs an NVIDIA GPU; the devices are '{platform}': take 'fused'")
        if jnp.dtype(dtype).itemsize != 2:
            raise ConfigError(f"{setting}='cudnn' computes in 16 bits, but model.dtype='{dtype}': take 'fused'")


def _plain(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segment_ids_BL: jax.Array | None,
    placement: Placement | None,
) -> jax.Array:
    del placement  # the compiler partitions it
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    R = H // G  # query heads of a group; they are further rows of the group's matrix products
    q_BGRLK = jnp.moveaxis(q_BLHK.reshape(B, L, G, R, K), 1, 3)
    k_BGLK, v_BGLK = (jnp.swapaxes(x, 1, 2) for x in (k_BLGK, v_BLGK))
    ids_BL = jnp.zeros((1, L), jnp.int32) if segment_ids_BL is None else segment_ids_BL
    blocks = next(n for n in (4, 2, 1) if L % n == 0 and (64 * n <= L or n == 1))
    outputs = []
    for start in range(0, L, L // blocks):
        # A block of queries skips the keys after its last query: four blocks save 3/8 of the work.
        end = start + L // blocks
        places = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        keep_BSM = places & (ids_BL[:, start:end, None] == ids_BL[:, None, :end])
        outputs.append(_softmax_mix(q_BGRLK[:, :, :, start:end], k_BGLK[:, :, :end], v_BGLK[:, :, :end], keep_BSM))
    return jnp.moveaxis(jnp.concatenate(outputs, axis=3), 3, 1).reshape(B, L, H, K)


def _softmax_mix(q_BGRSK: jax.Array, k_BGMK: jax.Array, v_BGMK: jax.Array, keep_BSM: jax.Array) -> jax.Array:
    """Attention of S queries over M keys (B, G, R, S, K). The division by the sum of exponentials comes last: the
    result is smaller than the scores."""
    B, G, R, S, K = q_BGRSK.shape
    dtype = jnp.promote_types(q_BGRSK.dtype, jnp.float32)
    q_BGNK = q_BGRSK.reshape(B, G, R * S, K)
    scores_BGNM = jnp.einsum("bgnk,bgmk->bgnm", q_BGNK, k_BGMK, preferred_element_type=dtype) / math.sqrt(K)
    scores_BGNM = jnp.where(jnp.tile(keep_BSM, (1, R, 1))[:, None], scores_BGNM, MASKED)
    top_BGN1 = jax.lax.stop_gradient(jnp.max(scores_BGNM, axis=-1, keepdims=True))
    weights_BGNM = jnp.exp(scores_BGNM - top_BGN1)
    sum_BGN1 = jnp.sum(weights_BGNM, axis=-1, keepdims=True)
    mixed_BGNK = jnp.einsum("bgnm,bgmk->bgnk", weights_BGNM.astype(q_BGRSK.dtype), v_BGMK, preferred_element_type=dtype)
    return (mixed_BGNK / sum_BGN1).astype(q_BGRSK.dtype).reshape(B, G, R, S, K)


def _cudnn(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segment_ids_BL: jax.Array | None,
    placement: Placement | None,
) -> jax.Array:
    del placement
    if segment_ids_BL is not None:
        raise ConfigError("attention='cudnn' cannot honour segment ids (data.document_attention); use 'plain'")
    return jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, is_causal=True, implementation="cudnn")


def _splash(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segment_ids_BL: jax.Array | None,
    placement: Placement | None,
) -> jax.Array:
    length = q_BLHK.shape[1]
    if length % SPLASH_BLOCKS[-1]:
        raise ConfigError(
            f"attention='splash' needs sequences of a multiple of {SPLASH_BLOCKS[-1]} tokens, not of {length}: take "
            "another model.max_length, or 'fused'"
        )
    kernel = functools.partial(_splash_local, interpret=platform_of(placement) != "tpu")
    if placement is None:
        return kernel(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)
    heads, kv_heads = placement.spec("batch", None, "heads", None), placement.spec("batch", None, "kv_heads", None)
    # Pallas results do not say over which mesh axes they vary, so the check is off.
    sharded = jax.shard_map(
        kernel,
        mesh=placement.mesh,
        in_specs=(heads, kv_heads, kv_heads, placement.spec("batch", None)),
        out_specs=heads,
        check_vma=False,
    )
    return sharded(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)


def _splash_local(
    q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, segment_ids_BL: jax.Array | None, *, interpret: bool
) -> jax.Array:
    # A local import: Pallas for TPU takes 0.5 s, and the other backends do not need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    L, H, K = q_BLHK.shape[1:]
    block = next(size for size in SPLASH_BLOCKS if L % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((L, L))] * H)
    attention = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    repeats = H // k_BLGK.shape[2]
    scaled_BLHK = q_BLHK.astype(jnp.promote_types(q_BLHK.dtype, jnp.float32)) / math.sqrt(K)
    q, k, v = (x.swapaxes(1, 2) for x in (scaled_BLHK.astype(q_BLHK.dtype), k_BLGK, v_BLGK))
    k, v = (jnp.repeat(x, repeats, axis=1) for x in (k, v))
    if segment_ids_BL is None:
        out = jax.vmap(attention)(q, k, v)
    else:
        out = jax.vmap(lambda q, k, v, s: attention(q, k, v, splash.SegmentIds(s, s)))(q, k, v, segment_ids_BL)
    return out.swapaxes(1, 2).astype(q_BLHK.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"plain": _plain, "cudnn": _cudnn, "splash": _splash}
