"""Gradients of a bfloat16 model: what is summed over tokens, microbatches and devices is summed in float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, with_fields
from rounded_model import mean_gradient
from step_cases import on_mesh

from flmjax.config import MeshShape
from flmjax.model.layers import Linear, dropout_of
from flmjax.model.transformer import Transformer, abstract_params, init_params, lookup
from flmjax.sharding.axes import map_with_axes
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement, tree_shardings
from flmjax.training.step import gradients

ROWS = 1024  # 16,384 tokens: 256 microbatches of four data shards
GPT = with_fields(TINY, position="learned", embedding_multiplier=1.3, output_multiplier=1 / 44)
LLAMA = with_fields(
    TINY, norm="rmsnorm", activation="swiglu", position="rope", bias=False, tied_embedding=False, num_kv_heads=2
)
FLM = with_fields(TINY, base_embed_dim=8, softmax_temperature=1.7)


def repetitive_batch(config, share=0.9):
    """Tokens of which `share` are the id 7, as are the targets."""
    rng = np.random.default_rng(0)
    shape = (ROWS, config.max_length)
    ids = rng.integers(0, config.vocab_size, (2, *shape))
    tokens, targets = np.where(rng.random(ids.shape) < share, 7, ids).astype(np.int32)
    ones = {"weights": np.ones(shape, np.float32), "bytes": np.ones(ROWS, np.float32)}
    return {"tokens": tokens, "targets": targets, **ones}


@functools.cache
def expected(config):
    """Parameters, batch, the float32 gradient and the gradient of rounded operands that are summed in float32."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    batch = repetitive_batch(config)
    return params, batch, *(mean_gradient(params, config, batch, rounded=rounded) for rounded in (False, True))


def check_leaves(config, computed):
    """Each leaf's error is at most 1e-3 of its norm and 1.5 times what rounded operands cost.

    The rounding errors of operands that are computed in another order are others, hence 1.5. The gradient of a key's
    bias is 0 in exact arithmetic where positions do not rotate: no norm counts as less than 1e-6 of the largest.
    """
    _, _, exact, rounded = expected(config)
    least = 1e-6 * max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(exact))

    def check(path, leaf, got, exact, rounded):
        error, cost = (np.linalg.norm(np.float64(x) - exact) for x in (got, rounded))
        assert error <= 1e-3 * max(np.linalg.norm(exact), least) + 1.5 * cost, path

    map_with_axes(check, abstract_params(config)[1], computed, exact, rounded)


@pytest.mark.parametrize("microbatches", [1, 16, 256])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["gpt", "llama", "flm"])
def test_a_bfloat16_gradient_is_summed_in_float32(name, shape, microbatches):
    config = {"gpt": GPT, "llama": LLAMA, "flm": FLM}[name]
    params, batch, _, _ = expected(config)
    mesh = make_mesh(MeshShape(*shape), jax.devices()[: int(np.prod(shape))])
    shardings = tree_shardings(mesh, abstract_params(config)[1])
    compute = functools.partial(
        gradients, config=with_fields(config, dtype="bfloat16"), placement=Placement(mesh), microbatches=microbatches
    )
    run = jax.jit(compute, out_shardings=(None, shardings))
    _, computed = run(jax.device_put(params, shardings), on_mesh(batch, mesh), jax.random.key(0))
    check_leaves(config, computed)


def test_a_row_that_occurs_65536_times_gets_65536_gradients():
    """Summed in bfloat16 they are 256."""
    ids = np.zeros((64, 1024), np.int32)
    gradient = jax.jit(jax.grad(lambda table: jnp.sum(lookup(table, ids, "bfloat16").astype(jnp.float32))))
    np.testing.assert_array_equal(gradient(np.ones((3, 2), np.float32)), [[65536, 65536], [0, 0], [0, 0]])


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_a_linear_layer_sums_its_gradients_in_float32(name):
    """65,537 ones, which no bfloat16 number is."""
    layer = Linear(with_fields(TINY, dtype="bfloat16"), None, {"embed": 2}, {"mlp": 3})
    x = np.ones((65537, 2), np.float32)
    params = jax.tree.map(jnp.asarray, nn.meta.unbox(layer.init(jax.random.key(0), x[:1])))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply(p, x).astype(jnp.float32))))(params)
    np.testing.assert_array_equal(gradient["params"][name], np.full(params["params"][name].shape, 65537))


@pytest.mark.parametrize(
    "fields", [{"output_multiplier": 1 / 44}, {"embedding_multiplier": 1 / 44}, {"softmax_temperature": 44.0}], ids=str
)
def test_a_multiplier_is_applied_in_float32(fields):
    """1/44 in bfloat16 is off by 0.098 %, which scales every logit; the rounding errors of the states average out."""
    # Blocks that add nothing, and a norm that divides by 100 whatever it reads.
    config = with_fields(TINY, dtype="bfloat16", norm="rmsnorm", bias=False, norm_eps=1e4)
    params = init_params(config, jax.random.key(0))
    params = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}
    tokens = repetitive_batch(config, share=0.0)["tokens"]

    def states(config):
        return np.float64(Transformer(config).apply({"params": params}, tokens, method="features")[0])

    plain, multiplied = states(config), states(with_fields(config, **fields))
    assert np.sum(plain * multiplied) / np.sum(plain**2) == pytest.approx(1 / 44, rel=4e-4)


def test_dropout_divides_by_the_exact_share_that_it_keeps():
    """0.9 in bfloat16 is off by 0.17 %."""
    config = with_fields(TINY, dtype="bfloat16", dropout=0.1)
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (256, 256)), jnp.bfloat16)

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self):
            return dropout_of(config, deterministic=False, placement=None)(x)

    dropped = Dropped().apply({}, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(dropped) > 0
    assert np.sum(np.float64(dropped)) / np.sum(np.float64(x)[kept]) == pytest.approx(1 / 0.9, rel=4e-4)
