"""The decoder in plain float32 code, whose products may take operands that are rounded to bfloat16.

Nothing is summed in bfloat16: what differs from a float32 model is the cost of rounded operands alone. Names carry
shapes, as in tests/reference.py.
"""

import functools
import math

import jax
import jax.numpy as jnp

from flmjax.model.positions import rotate, rotation


def cross_entropy(params, config, batch, rounded):
    """Sum of weight * cross-entropy in nats; the weights are cast once and their gradients are not rounded."""

    def cast(x):  # an activation: its gradient is rounded too
        return x.astype(jnp.bfloat16).astype(jnp.float32) if rounded else x

    def weight(p):
        return p + jax.lax.stop_gradient(cast(p) - p)

    def norm(x_BLD, leaves):
        x_BLD = x_BLD - (jnp.mean(x_BLD, -1, keepdims=True) if config.norm == "layernorm" else 0)
        x_BLD = x_BLD / jnp.sqrt(jnp.mean(x_BLD**2, -1, keepdims=True) + config.norm_eps) * leaves["scale"]
        return x_BLD + leaves.get("bias", 0)

    def linear(x, leaves, inputs=1):
        y = cast(jnp.tensordot(x, weight(leaves["kernel"]), inputs))
        return cast(y + leaves["bias"]) if "bias" in leaves else y

    def attention(x_BLD, leaves):
        q, k, v = (linear(x_BLD, leaves[name]) for name in ("query", "key", "value"))
        if config.is_rotary:
            turns = rotation(config, jnp.arange(x_BLD.shape[1])[None])
            q = cast(rotate(q, turns.query_cos, turns.query_sin))
            k = cast(rotate(k, turns.key_cos, turns.key_sin))
        k, v = (jnp.repeat(x, config.num_heads // config.kv_heads, axis=2) for x in (k, v))
        scores_BHLM = jnp.einsum("blhk,bmhk->bhlm", q, k) / math.sqrt(config.head_dim)
        scores_BHLM = jnp.where(jnp.tri(x_BLD.shape[1], dtype=bool), scores_BHLM, -1e30)
        shares_BHLM = jnp.exp(scores_BHLM - jax.lax.stop_gradient(jnp.max(scores_BHLM, -1, keepdims=True)))
        sums_BLH1 = jnp.sum(shares_BHLM, -1).swapaxes(1, 2)[..., None]
        return linear(cast(jnp.einsum("bhlm,bmhk->blhk", cast(shares_BHLM), v) / sums_BLH1), leaves["output"], 2)

    def mlp(x_BLD, leaves):
        h_BLF = linear(x_BLD, leaves["up"])
        if config.activation == "swiglu":
            h_BLF = cast(cast(jax.nn.silu(linear(x_BLD, leaves["gate"]))) * h_BLF)
        else:
            h_BLF = cast(jax.nn.gelu(h_BLF, approximate=config.activation == "gelu_tanh"))
        return linear(h_BLF, leaves["down"])

    def block(x_BLD, leaves):
        x_BLD = cast(x_BLD + attention(cast(norm(x_BLD, leaves["attention_norm"])), leaves["attention"]))
        return cast(x_BLD + mlp(cast(norm(x_BLD, leaves["mlp_norm"])), leaves["mlp"]))

    x_BLD = weight(params["embedding"])[batch["tokens"]] * config.embedding_multiplier
    if not config.is_rotary:
        x_BLD = x_BLD + params["positions"][: x_BLD.shape[1]][None]
    x_BLD = cast(x_BLD)
    for n in range(config.num_layers):
        x_BLD = block(x_BLD, jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]))
    scale = config.output_multiplier / config.softmax_temperature / config.width_multiplier
    x_BLD = cast(norm(x_BLD, params["final_norm"]) * scale)
    head_VD = params["embedding"] if config.tied_embedding else params["head"].T
    logits_BLV = _logits(cast, x_BLD, weight(head_VD))[..., : config.vocab_size]
    picked_BL = jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), batch["targets"][..., None], -1)[..., 0]
    return -jnp.sum(batch["weights"] * picked_BL)


def _logits(cast, x_BLD, head_VD):
    """The logits are not rounded, their gradient is."""

    @jax.custom_vjp
    def gradient_cast(logits):
        return logits

    gradient_cast.defvjp(lambda logits: (logits, None), lambda _, g: (cast(g),))
    return gradient_cast(jnp.einsum("bld,vd->blv", x_BLD, head_VD))


@functools.partial(jax.jit, static_argnames=("config", "rounded"))
def mean_gradient(params, config, batch, rounded):
    """Gradient of the mean cross-entropy over the weighted targets."""
    gradient = jax.grad(cross_entropy)(params, config, batch, rounded)
    return jax.tree.map(lambda g: g / jnp.sum(batch["weights"]), gradient)
