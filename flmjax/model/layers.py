"""Norm, attention and MLP of the decoder block. transformer.py explains the shape suffixes of tensor names."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from flmjax.config import ModelConfig
from flmjax.model.attention import attend
from flmjax.model.mup import scaling_of
from flmjax.model.positions import Rotation, rotate
from flmjax.sharding.axes import LeafAxes, declare
from flmjax.sharding.rules import REPLICAS, Placement, constrain, platform_of

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "swiglu": nn.silu,  # of the gate
}


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the embed axis, computed in at least float32.

    The variance takes two passes. The one-pass formula E[x^2] - E[x]^2 cancels for inputs with a large mean: at mean
    300 and deviation 0.01 the result is off by 29 units.
    """

    config: ModelConfig
    # Whether it is the model's last norm, whose parameters have the roles output_scale and output_shift.
    last: bool = False
    factor: float = 1.0  # the result is multiplied by it

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
        return (x * self.factor).astype(c.dtype)


class Linear(nn.Module):
    """Product with a kernel from named input axes to named output axes, plus biases if the config has them.

    Parameters and their gradients are float32; the product takes operands in config.dtype.

    Attributes:
        inputs, outputs: size of each axis by name, in the order of dimensions.
        roles: role of an output axis where it is not "write".
    """

    config: ModelConfig
    placement: Placement | None
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    roles: Mapping[str, str] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (..., outputs) in config.dtype for x (..., inputs)."""
        c = self.config
        reads, writes = dict.fromkeys(self.inputs, "read"), {**dict.fromkeys(self.outputs, "write"), **self.roles}
        axes = LeafAxes(("layers", *reads, *writes), ("stack", *reads.values(), *writes.values()))
        normal = nn.initializers.normal(scaling_of(c, axes).init_std)
        inputs, outputs = tuple(self.inputs.values()), tuple(self.outputs.values())

        def as_matrix(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return normal(key, (math.prod(inputs), math.prod(outputs)), dtype).reshape(shape)

        kernel = self.param("kernel", declare(as_matrix, **reads, **writes), (*inputs, *outputs), jnp.float32)
        y = product(x.astype(c.dtype), kernel, len(inputs), self.placement)
        if not c.bias:
            return y
        bias = self.param("bias", declare(nn.initializers.zeros, **writes), outputs, jnp.float32)
        # Added in float32, so that its gradient is a float32 sum.
        return (y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))).astype(c.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, contracted: int, placement: Placement | None = None) -> jax.Array:
    """Product of x (..., inputs) and a float32 kernel (inputs, outputs), computed in the dtype of x.

    The gradient of the kernel is a product with float32 results: the gradient of a cast kernel would be rounded to the
    dtype of x before it is summed over devices and microbatches.

    Args:
        contracted: number of input axes.
        placement: of the activations. On one CPU XLA has a fast routine for products of rows with columns alone: the
            smaller factor of the kernel's gradient is first transposed in memory, behind a barrier that keeps XLA from
            folding the transpose back. The gradient of a 256 x 1024 kernel takes half the time.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), contracted)


def _product_forward(x: jax.Array, kernel: jax.Array, contracted: int, placement: Placement | None) -> Any:
    # Not `product` itself: remat="dots" keeps the results of products that it sees, and sees none in a custom_vjp.
    # The cast kernel is kept: gathered over fsdp once, it serves both products of the backward pass.
    cast = kernel.astype(x.dtype)
    return jnp.tensordot(x, cast, contracted), (x, cast)


def _product_backward(
    contracted: int, placement: Placement | None, factors: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    tokens = tuple(range(x.ndim - contracted))
    output_axes = tuple(range(len(tokens), g.ndim)), tuple(range(contracted, kernel.ndim))
    dx = jnp.tensordot(g, kernel, output_axes)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, g = operands_of_float32_sum(placement, x, g)
    if placement is not None and placement.is_single_cpu:
        inputs, outputs = math.prod(kernel.shape[:contracted]), math.prod(kernel.shape[contracted:])
        x_TI, g_TO, in_memory = x.reshape(-1, inputs), g.reshape(-1, outputs), jax.lax.optimization_barrier
        if inputs <= outputs:
            dkernel = jnp.matmul(in_memory(x_TI.T), g_TO, preferred_element_type=dtype)
        else:
            dkernel = in_memory(jnp.matmul(in_memory(g_TO.T), x_TI, preferred_element_type=dtype)).T
        dkernel = dkernel.reshape(kernel.shape)
    else:
        dkernel = jnp.tensordot(x, g, (tokens, tokens), preferred_element_type=dtype)
    return dx, dkernel


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def constrain_gradient(x: jax.Array, placement: Placement | None, names: tuple[str | None, ...]) -> jax.Array:
    """`x` itself, whose gradient is pinned to the sharding of the logical axes `names`."""
    return x


constrain_gradient.defvjp(
    lambda x, placement, names: (x, None),
    lambda placement, names, _, gradient: (constrain(placement, gradient, *names),),
)


def operands_of_float32_sum(placement: Placement | None, *factors: jax.Array) -> Sequence[jax.Array]:
    """Factors of a product whose preferred_element_type is float32: on CPUs cast to float32.

    XLA's CPU backend refuses such a product of bfloat16 factors if its result is transposed: "Unsupported element type
    for DotThunk::Execute: BF16 x BF16 = F32".
    """
    if platform_of(placement) != "cpu":
        return factors
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in factors]


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
        q_BLHK = Linear(c, self.placement, embed, heads, {"head_dim": "query"}, name="query")(x_BLD)
        k_BLGK = Linear(c, self.placement, embed, kv_heads, {"head_dim": "key"}, name="key")(x_BLD)
        v_BLGK = Linear(c, self.placement, embed, kv_heads, name="value")(x_BLD)
        if rotation is not None:
            q_BLHK = rotate(q_BLHK, rotation.query_cos, rotation.query_sin)
            k_BLGK = rotate(k_BLGK, rotation.key_cos, rotation.key_sin)
        # Pinned, else the partitioner shards the backward pass over the sequence: all-to-all of L x L arrays.
        q_BLHK = constrain(self.placement, q_BLHK, "batch", None, "heads", None)
        k_BLGK = constrain(self.placement, k_BLGK, "batch", None, "kv_heads", None)
        v_BLGK = constrain(self.placement, v_BLGK, "batch", None, "kv_heads", None)
        o_BLHK = attend(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, implementation=c.attention, placement=self.placement)
        o_BLHK = constrain(self.placement, o_BLHK, "batch", None, "heads", None)
        return Linear(c, self.placement, heads, embed, name="output")(o_BLHK)


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
        h_BLF = Linear(c, self.placement, embed, mlp, name="up")(x_BLD)
        if c.activation == "swiglu":
            gate_BLF = Linear(c, self.placement, embed, mlp, name="gate")(x_BLD)
            h_BLF = in_float32(lambda gate, h: activation(gate) * h)(gate_BLF, h_BLF)
        else:
            h_BLF = in_float32(activation)(h_BLF)
        h_BLF = constrain(self.placement, h_BLF, "batch", None, "mlp")
        return Linear(c, self.placement, mlp, embed, name="down")(h_BLF)


def in_float32(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Elementwise `f` computed in at least float32, constants included; the result has the dtype of the first argument.

    For arguments of 16 bits the backward pass keeps the arguments alone and computes `f` again.
    """

    def computed(*x: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x[0].dtype, jnp.float32)
        if dtype == x[0].dtype:
            return f(*x)
        return jax.checkpoint(lambda *x: f(*(y.astype(dtype) for y in x)).astype(x[0].dtype))(*x)

    return computed


class Dropout(nn.Module):
    """Dropout whose draws for a sequence are the same whether a batch is computed at once or replica by replica.

    nn.Dropout would draw the same mask for every replica of a vmap.
    """

    rate: float
    placement: Placement | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns (B, L, D)."""
        keep = 1 - self.rate
        key = self.make_rng("dropout")
        if self.placement is not None and self.placement.is_of_replica:
            kept_BLD = draw_of_replica(key, keep, x_BLD.shape)
        else:
            kept_BLD = jax.random.bernoulli(key, keep, x_BLD.shape)
        return jax.lax.select(kept_BLD, x_BLD / keep, jnp.zeros_like(x_BLD))


def draw_of_replica(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """Booleans (B, ...) of a replica, inside of a vmap over the axis REPLICAS: its part of the draw for all replicas.

    The batching rule returns all parts as they were drawn, so that every device draws its part alone; a lookup of each
    replica's part would gather the draw.
    """

    def draw_all(key: jax.Array, replicas: int) -> jax.Array:
        rows, *rest = shape
        return jax.random.bernoulli(key, probability, (replicas * rows, *rest)).reshape(replicas, *shape)

    @jax.custom_batching.custom_vmap
    def draw(key: jax.Array, replica: jax.Array) -> jax.Array:
        return draw_all(key, jax.lax.axis_size(REPLICAS))[replica]

    draw.def_vmap(lambda replicas, is_batched, key, replica: (draw_all(key, replicas), True))
    return draw(key, jax.lax.axis_index(REPLICAS))


def dropout_of(
    config: ModelConfig, deterministic: bool, placement: Placement | None
) -> Callable[[jax.Array], jax.Array]:
    """Dropout of activations in config.dtype; the factor 1 / (1 - rate) is applied in at least float32."""
    if deterministic or not config.dropout:
        return lambda x: x
    dropout, dtype = Dropout(config.dropout, placement), jnp.promote_types(config.dtype, jnp.float32)
    return lambda x: dropout(x.astype(dtype)).astype(x.dtype)
