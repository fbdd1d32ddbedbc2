"""Norm, attention and MLP of the decoder block. transformer.py explains the shape suffixes of tensor names."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flmjax.config import ModelConfig
from flmjax.model.attention import attend
from flmjax.model.mup import scaling_of
from flmjax.model.positions import Rotation, rotate
from flmjax.sharding.axes import LeafAxes, declare
from flmjax.sharding.rules import Placement, constrain

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "swiglu": nn.silu,  # of the gate
}


DotDimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
Precision = jax.lax.PrecisionLike


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the embed axis, computed in at least float32.

    The variance takes two passes. The one-pass formula E[x^2] - E[x]^2 cancels for inputs with a large mean: at mean
    300 and deviation 0.01 the result is off by 29 units.
    """

    config: ModelConfig
    last: bool = (
        False  # whether it is the model's last norm, whose parameters have the roles output_scale, output_shift
    )

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
    """Linear layer from named input axes to named output axes, with biases if the config has them.

    Args:
        inputs, outputs: size of each axis by name, in the order of dimensions.
        roles: role of an output axis where it is not "write".
    """
    reads, writes = dict.fromkeys(inputs, "read"), {**dict.fromkeys(outputs, "write"), **roles}
    std = scaling_of(
        config, LeafAxes(("layers", *reads, *writes), ("stack", *reads.values(), *writes.values()))
    ).init_std
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
    x: jax.Array, kernel: jax.Array, dimensions: DotDimensions, precision: Precision, preferred_element_type: Any = None
) -> jax.Array:
    """lax.dot_general of DenseGeneral with a kernel gradient that is fast on XLA's CPU backend.

    That backend has a fast routine for products of rows with columns alone. The gradient therefore transposes the
    smaller factor in memory first; a barrier keeps XLA from folding the transpose back. The gradient of a 256 x 1024
    kernel takes half the time.
    """
    return jax.lax.dot_general(x, kernel, dimensions, precision, preferred_element_type)


def _single_cpu_forward(x: jax.Array, kernel: jax.Array, *static_args: Any) -> Any:
    return single_cpu_dot(x, kernel, *static_args), (x, kernel)


def _single_cpu_backward(
    dimensions: DotDimensions,
    precision: Precision,
    preferred_element_type: Any,
    factors: tuple[jax.Array, jax.Array],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    contracted = len(dimensions[0][0])  # the last axes of x with the first axes of the kernel
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
        # Pinned, else the partitioner shards the backward pass over the sequence: all-to-all of L x L arrays.
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
