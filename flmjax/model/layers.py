"""Norm, attention and MLP of the one block. Shapes: see transformer.py."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flmjax.config import ModelConfig
from flmjax.model.attention import attend
from flmjax.model.mup import scaling_table
from flmjax.model.positions import Rotation, rotate
from flmjax.sharding.axes import declare
from flmjax.sharding.rules import Placement, constrain

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "swiglu": nn.silu,  # of the gate
}


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the embedding, in float32, the variance in two passes.

    E[x^2] - E[x]^2, the fast way, cancels for inputs with a large mean: off by 29 units at mean 300, deviation 0.01.
    """

    config: ModelConfig
    last: bool = False  # of the model: its roles say so

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns (B, L, D) in config.dtype."""
        c = self.config
        prefix = "output_" if self.last else ""
        x = x_BLD.astype(jnp.promote_types(c.dtype, jnp.float32))
        if c.norm == "layernorm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + c.norm_eps)
        scale = self.param("scale", declare(nn.initializers.ones, embed=prefix + "scale"), (c.embed_dim,), jnp.float32)
        x = x * scale
        if c.norm == "layernorm" and c.bias:
            shift = declare(nn.initializers.zeros, embed=prefix + "shift")
            x = x + self.param("bias", shift, (c.embed_dim,), jnp.float32)
        return x.astype(c.dtype)


def projection(
    config: ModelConfig,
    placement: Placement | None,
    name: str,
    inputs: dict[str, int],
    outputs: dict[str, int],
    **roles: str,
) -> nn.DenseGeneral:
    """A linear map from named input axes to named output axes; `roles` of outputs that are not just written."""
    reads, writes = dict.fromkeys(inputs, "read"), {**dict.fromkeys(outputs, "write"), **roles}
    std = scaling_table(config)["residual" if writes.get("embed") == "write" else "hidden"].init_std
    return nn.DenseGeneral(
        features=tuple(outputs.values()),
        axis=tuple(range(-len(inputs), 0)),
        use_bias=config.bias,
        kernel_init=declare(nn.initializers.normal(std), **reads, **writes),
        bias_init=declare(nn.initializers.zeros, **writes),
        dot_general=single_cpu_dot if placement is not None and placement.is_single_cpu else None,
        dtype=config.dtype,
        param_dtype=jnp.float32,
        name=name,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def single_cpu_dot(
    x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any, preferred_element_type: Any = None
) -> jax.Array:
    """lax.dot_general of DenseGeneral, with a weight gradient that XLA's CPU backend multiplies at full speed.

    It has a fast kernel for row times column alone: with the smaller factor transposed in memory first, behind a
    barrier that keeps the transpose from being folded back, the gradient of a 256 x 1024 kernel takes half the time.
    """
    return jax.lax.dot_general(x, kernel, dimensions, precision, preferred_element_type)


def _single_cpu_forward(x: jax.Array, kernel: jax.Array, *how: Any) -> Any:
    return single_cpu_dot(x, kernel, *how), (x, kernel)


def _single_cpu_backward(
    dimensions: Any, precision: Any, preferred_element_type: Any, factors: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    contracted = len(dimensions[0][0])  # the last axes of x, the first of the kernel
    inputs, outputs = math.prod(kernel.shape[:contracted]), math.prod(kernel.shape[contracted:])
    x_TI, g_TO, kernel_IO = x.reshape(-1, inputs), g.reshape(-1, outputs), kernel.reshape(inputs, outputs)
    in_memory = jax.lax.optimization_barrier
    if inputs <= outputs:
        dkernel_IO = jnp.matmul(in_memory(x_TI.T), g_TO, precision=precision)
    else:
        dkernel_IO = in_memory(jnp.matmul(in_memory(g_TO.T), x_TI, precision=precision)).T
    dx_TI = jnp.matmul(g_TO, kernel_IO.T, precision=precision)
    return dx_TI.reshape(x.shape), dkernel_IO.reshape(kernel.shape)


single_cpu_dot.defvjp(_single_cpu_forward, _single_cpu_backward)


class Attention(nn.Module):
    """Grouped-query causal self-attention."""

    config: ModelConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, rotation: Rotation | None, segment_ids_BL: jax.Array | None) -> jax.Array:
        """Returns (B, L, D)."""
        c = self.config
        embed = {"embed": c.embed_dim}
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv_heads = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        q_BLHK = projection(c, self.placement, "query", embed, heads, head_dim="query")(x_BLD)
        k_BLGK = projection(c, self.placement, "key", embed, kv_heads, head_dim="key")(x_BLD)
        v_BLGK = projection(c, self.placement, "value", embed, kv_heads)(x_BLD)
        if rotation is not None:
            q_BLHK = rotate(q_BLHK, rotation.query_cos, rotation.query_sin)
            k_BLGK = rotate(k_BLGK, rotation.key_cos, rotation.key_sin)
        # Unpinned, the partitioner lets the backward pass drift to sequence shards: all-to-all of L x L arrays.
        q_BLHK = constrain(self.placement, q_BLHK, "batch", None, "heads", None)
        k_BLGK = constrain(self.placement, k_BLGK, "batch", None, "kv_heads", None)
        v_BLGK = constrain(self.placement, v_BLGK, "batch", None, "kv_heads", None)
        o_BLHK = attend(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, implementation=c.attention, placement=self.placement)
        o_BLHK = constrain(self.placement, o_BLHK, "batch", None, "heads", None)
        return projection(c, self.placement, "output", heads, embed)(o_BLHK)


class Mlp(nn.Module):
    """GELU or SwiGLU feed-forward network."""

    config: ModelConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns (B, L, D)."""
        c = self.config
        embed, mlp = {"embed": c.embed_dim}, {"mlp": c.mlp_dim}
        activation = ACTIVATIONS[c.activation]
        h_BLF = projection(c, self.placement, "up", embed, mlp)(x_BLD)
        if c.activation == "swiglu":
            h_BLF = activation(projection(c, self.placement, "gate", embed, mlp)(x_BLD)) * h_BLF
        else:
            h_BLF = activation(h_BLF)
        h_BLF = constrain(self.placement, h_BLF, "batch", None, "mlp")
        return projection(c, self.placement, "down", mlp, embed)(h_BLF)
