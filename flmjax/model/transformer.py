"""The decoder. The suffix of a tensor's name is its shape:

B batch (sequences), L length (tokens), D embed, F mlp, H query heads, G key/value heads, K head_dim, V vocab (padded),
N layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from flmjax.config import ModelConfig
from flmjax.model.attention import MASKED, with_plain_attention
from flmjax.model.layers import Attention, Mlp, Norm, constrain_gradient, dropout_of
from flmjax.model.mup import scaling_table
from flmjax.model.positions import Rotation, rotation
from flmjax.sharding.axes import AxesTree, Params, axes_of, declare
from flmjax.sharding.rules import Placement, constrain

REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
RESIDUAL = ("batch", "sequence", None)  # between blocks activations are split over the sequence too
GATHERED = ("batch", None, None)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    placement: Placement | None = None
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, rotation: Rotation | None, segment_ids_BL: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """Returns (B, L, D) and None: nn.scan expects a carry and a result to stack, and there is nothing to stack."""
        c = self.config
        dropout = dropout_of(c, self.deterministic, self.placement)

        def added(x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
            # The gradient is gathered once for both products that read it.
            y_BLD = constrain(self.placement, constrain_gradient(y_BLD, self.placement, GATHERED), *RESIDUAL)
            return constrain(self.placement, x_BLD + dropout(y_BLD), *RESIDUAL)

        def normed(name: str, x_BLD: jax.Array) -> jax.Array:
            # The shard is normalised before it is gathered in config.dtype: the other order would gather float32.
            y_BLD = constrain(self.placement, Norm(c, name=name)(x_BLD), *RESIDUAL)
            return constrain(self.placement, y_BLD, *GATHERED)

        y_BLD = Attention(c, self.placement, name="attention")(
            normed("attention_norm", x_BLD), rotation, segment_ids_BL
        )
        x_BLD = added(x_BLD, y_BLD)
        y_BLD = Mlp(c, self.placement, name="mlp")(normed("mlp_norm", x_BLD))
        x_BLD = added(x_BLD, y_BLD)
        return x_BLD, None


class Transformer(nn.Module):
    """Pre-norm decoder language model.

    Args:
        config: sizes and settings.
        placement: the activations' sharding (sharding.rules.Placement), or None on one device.
        deterministic: False switches dropout on; apply then needs rngs={"dropout": key}.
    """

    config: ModelConfig
    placement: Placement | None = None
    deterministic: bool = True

    @nn.compact
    def features(
        self, tokens_BL: jax.Array, segment_ids_BL: jax.Array | None = None, positions_BL: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Final hidden states (B, L, D) in config.dtype, multipliers included, and the output table (V, D) in float32.

        The logits are the product of the states and the table in config.dtype (`cast_table`); a loss may compute it in
        chunks, and computes the gradient of the table in float32.

        Raises:
            ValueError: for sequences longer than the table of learned positions (the lookup would repeat its last row).
        """
        c = self.config
        if not c.is_rotary and tokens_BL.shape[1] > c.max_length:
            raise ValueError(
                f"positions ({c.max_length}, {c.embed_dim}): learned positions end there, a sequence has "
                f"{tokens_BL.shape[1]} tokens; grow max_length first"
            )
        table = scaling_table(c)
        normal = nn.initializers.normal(table["input"].init_std)
        if positions_BL is None:
            positions_BL = jnp.arange(tokens_BL.shape[1])[None]
        table_shape = (c.padded_vocab_size, c.embed_dim)
        table_VD = self.param("embedding", declare(normal, vocab="index", embed="write"), table_shape, jnp.float32)
        rows_BLD = constrain(self.placement, lookup(table_VD, tokens_BL, c.dtype, self.placement), *GATHERED)
        # Multiplied, and positions added, in float32: a factor such as 1 / 44 would be rounded by 0.1 %.
        x_BLD = rows_BLD.astype(jnp.promote_types(c.dtype, jnp.float32)) * table["input"].forward
        if not c.is_rotary:
            init = declare(normal, length="index", embed="write")
            table_LD = self.param("positions", init, (c.max_length, c.embed_dim), jnp.float32)
            # The small table is gathered: a lookup of its shards would gather the activations.
            x_BLD = x_BLD + constrain(self.placement, table_LD, None, None)[positions_BL]
        x_BLD = constrain(self.placement, x_BLD.astype(c.dtype), *RESIDUAL)
        x_BLD = dropout_of(c, self.deterministic, self.placement)(x_BLD)
        x_BLD, _ = self._layers()(x_BLD, rotation(c, positions_BL), segment_ids_BL)
        final_norm = Norm(c, last=True, factor=table["output"].forward, name="final_norm")
        x_BLD = constrain(self.placement, constrain(self.placement, final_norm(x_BLD), *RESIDUAL), *GATHERED)
        if c.tied_embedding:
            return x_BLD, table_VD
        by_word = _transposed(nn.initializers.normal(table["output"].init_std))
        head_DV = self.param("head", declare(by_word, embed="read", vocab="write"), table_shape[::-1], jnp.float32)
        return x_BLD, head_DV.T

    def __call__(
        self, tokens_BL: jax.Array, segment_ids_BL: jax.Array | None = None, positions_BL: jax.Array | None = None
    ) -> jax.Array:
        """Logits (B, L, V) in at least float32. Padded ids have the logit -1e30, so that their probability is 0."""
        x_BLD, table_VD = self.features(tokens_BL, segment_ids_BL, positions_BL)
        table_VD = cast_table(table_VD, self.config.dtype, self.placement)
        logits_BLV = jnp.einsum(
            "bld,vd->blv", x_BLD, table_VD, preferred_element_type=jnp.promote_types(x_BLD.dtype, jnp.float32)
        )
        logits_BLV = constrain(self.placement, logits_BLV, "batch", None, "vocab")
        return mask_padding(logits_BLV, self.config)

    def _layers(self) -> nn.Module:
        c = self.config
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=c.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(c, self.placement, self.deterministic, name="layers")


def cast_table(table_VD: jax.Array, dtype: DTypeLike, placement: Placement | None) -> jax.Array:
    """The table (V, D) in `dtype`: rows gathered over fsdp, the vocabulary still sharded.

    Without this constraint a lookup would rematerialise the table.
    """
    return constrain(placement, table_VD.astype(dtype), "vocab", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, ids_BL: jax.Array, dtype: DTypeLike, placement: Placement | None = None) -> jax.Array:
    """Rows (B, L, D) of a float32 table in `dtype`.

    The gradient of the table is a float32 sum: in bfloat16 the row of an id that occurs 65,536 times would stop growing
    at 256 times its gradient.
    """
    return cast_table(table_VD, dtype, placement)[ids_BL]


def _lookup_forward(table_VD: jax.Array, ids_BL: jax.Array, dtype: DTypeLike, placement: Placement | None) -> Any:
    return lookup(table_VD, ids_BL, dtype, placement), (table_VD, ids_BL)


def _lookup_backward(dtype: DTypeLike, placement: Placement | None, residuals: Any, drows_BLD: jax.Array) -> Any:
    table_VD, ids_BL = residuals
    drows_BLD = constrain(placement, drows_BLD.astype(table_VD.dtype), *GATHERED)
    if placement is None or placement.mesh.size == 1:
        return jnp.zeros_like(table_VD).at[ids_BL].add(drows_BLD), None
    size = len(table_VD) // placement.mesh.shape["tensor"]

    def local_sum(ids_BL: jax.Array, drows_BLD: jax.Array) -> jax.Array:
        places_BL = ids_BL - jax.lax.axis_index("tensor") * size
        places_BL = jnp.where(places_BL >= 0, places_BL, size)  # a negative place would count from the end
        zeros = jnp.zeros((size, drows_BLD.shape[-1]), drows_BLD.dtype)
        return scattered_sum(zeros.at[places_BL].add(drows_BLD, mode="drop"), placement)

    batch, table = placement.spec("batch"), P(*placement.spec("vocab"), "fsdp")
    shard = jax.shard_map(local_sum, mesh=placement.mesh, in_specs=(batch, batch), out_specs=table, check_vma=False)
    return shard(ids_BL, drows_BLD), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def scattered_sum(table_VD: jax.Array, placement: Placement) -> jax.Array:
    """Inside of a shard_map: the sum over the data shards of a table (V, D), of which each device gets its columns."""
    columns_VD = jax.lax.psum_scatter(table_VD, "fsdp", scatter_dimension=1, tiled=True)
    return columns_VD if placement.is_of_replica else jax.lax.psum(columns_VD, "replica")


def _transposed(init: jax.nn.initializers.Initializer) -> Callable[..., jax.Array]:
    """Initializer that draws the transpose: the values of a word then do not depend on the number of words after it."""
    return lambda key, shape, dtype: init(key, shape[::-1], dtype).T


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BL: jax.Array,
    segment_ids_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    placement: Placement | None = None,
) -> jax.Array:
    """Logits (B, L, V) of Transformer(config), without dropout."""
    model: Any = Transformer(config, placement)
    return model.apply({"params": params}, tokens_BL, segment_ids_BL, positions_BL)


def real_ids(config: ModelConfig) -> jax.Array:
    """Boolean (V,): whether an id is in the vocabulary; False for its padding."""
    assert config.vocab_size is not None
    return jnp.arange(config.padded_vocab_size) < config.vocab_size


def mask_padding(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits (..., V) in which padded ids have the value -1e30."""
    if config.padded_vocab_size == config.vocab_size:
        return logits
    return jnp.where(real_ids(config), logits, MASKED)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Initial float32 parameters; their values do not depend on the mesh that they are placed on."""
    params: Params = nn.meta.unbox(_init(config, key))
    return params


@functools.cache
def abstract_params(config: ModelConfig) -> tuple[Params, AxesTree]:
    """Tree of ShapeDtypeStruct and tree of LeafAxes of a model. Both are cached: callers must not change them."""
    boxed = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    return nn.meta.unbox(boxed), axes_of(boxed)


def _init(config: ModelConfig, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, min(8, config.max_length)), jnp.int32)
    model = Transformer(with_plain_attention(config))  # the tokens are fewer than a fused kernel's blocks
    params: Params = model.init(key, tokens, method="features")["params"]
    return params


def count_parameters(params: Params) -> int:
    """Number of parameters, padding of the vocabulary included."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
