"""The JAX model against the float64 NumPy model, and properties that no comparison of outputs shows."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import TINY, random_batch, random_params, with_fields

from flmjax.config import ConfigError
from flmjax.model.attention import IMPLEMENTATIONS, attend, choose
from flmjax.model.layers import Norm
from flmjax.model.loss import loss_sums
from flmjax.model.positions import rotation
from flmjax.model.transformer import Transformer, abstract_params, count_parameters, forward, init_params
from flmjax.sharding.axes import LeafAxes, map_with_axes

# Every value of every setting, and every pair of values of norm, activation, position and the four switches.
SETTINGS = {
    "flm": {"position": "xpos"},
    "gpt2": {"position": "learned", "activation": "gelu_tanh"},
    "llama": {
        "norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "tied_embedding": False,
        "num_kv_heads": 2,
    },
    "tele_flm": {
        "norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "tied_embedding": False,
        "embedding_multiplier": 1.5, "output_multiplier": 0.125, "softmax_temperature": 2.0,
    },
    "swiglu_with_biases": {"activation": "swiglu", "position": "learned", "num_kv_heads": 1, "remat": "full"},
    "rmsnorm_learned_untied": {"norm": "rmsnorm", "position": "learned", "tied_embedding": False, "remat": "dots"},
    "rmsnorm_gelu_tanh_xpos": {"norm": "rmsnorm", "activation": "gelu_tanh", "bias": False, "num_kv_heads": 2},
    "mup": {"base_embed_dim": 12},
    "heads_grown_by_zero": {"position": "xpos", "rotary_dim": 4},
    "heads_grown_by_copies": {"position": "xpos", "rotary_dim": 6, "rotary_repeat": True},
    "rope_partly": {"position": "rope", "rotary_dim": 2, "num_kv_heads": 2},
    "layernorm_rope_no_bias": {"activation": "gelu", "position": "rope", "bias": False, "tied_embedding": False},
    "multipliers": {"embedding_multiplier": 3.0, "output_multiplier": 0.5, "softmax_temperature": 2.0},
    "other_constants": {"norm_eps": 0.1, "rope_theta": 100.0, "xpos_scale_base": 8.0, "scan_unroll": 2},
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def jax_model(config, params, batch):
    segments, positions = batch.get("segment_ids"), batch.get("positions")
    logits = Transformer(config).apply({"params": params}, batch["tokens"], segments, positions)
    return logits, loss_sums(params, batch, config)[0]


@pytest.mark.parametrize("segments", [False, True], ids=["whole_rows", "packed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_model_equals_the_oracle(name, segments):
    config = with_fields(TINY, **SETTINGS[name])
    params, batch = random_params(config), random_batch(config, segments=segments)
    logits, loss = jax_model(config, params, batch)
    expected = reference.logits(params, config, batch["tokens"], batch.get("segment_ids"), batch.get("positions"))
    real = np.s_[..., : config.vocab_size]
    scale = np.abs(expected[real]).max()
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], atol=1e-5 * max(scale, 1), rtol=0)
    np.testing.assert_allclose(loss, reference.loss(params, config, batch)[0], rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_parameter_tree_is_that_of_the_oracle(name):
    config = with_fields(TINY, **SETTINGS[name])
    params, axes = abstract_params(config)
    leaf_shapes = {
        path: leaf.shape for path, leaf in reference.flatten(jax.tree.map(lambda x: np.zeros(x.shape), params)).items()
    }
    assert leaf_shapes == reference.shapes(config)
    leaves = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, LeafAxes))
    assert [len(leaf.names) for leaf in leaves] == [x.ndim for x in jax.tree.leaves(params)]


def test_learned_positions_beyond_the_table_are_refused():
    config = with_fields(TINY, position="learned")
    tokens = random_batch(with_fields(TINY, max_length=17))["tokens"]
    with pytest.raises(ValueError, match=r"positions \(16, 32\): .* 17 tokens; grow max_length first"):
        forward(random_params(config), config, tokens)


def test_each_token_depends_on_itself_and_the_past_alone():
    config = with_fields(TINY, tied_embedding=False)
    params = random_params(config)
    tokens = random_batch(config)["tokens"][:1]

    def logits_of(table_rows):
        # Each position reads another row of the table, so that the gradient tells positions apart.
        moved = {**params, "embedding": jnp.zeros_like(params["embedding"]).at[: tokens.shape[1]].set(table_rows)}
        places = jnp.arange(tokens.shape[1])[None]
        return jnp.sum(jnp.abs(Transformer(config).apply({"params": moved}, places)[0, :, :61]), axis=-1)

    jacobian = jax.jit(jax.jacobian(logits_of))(jnp.asarray(params["embedding"])[tokens[0]])
    influence = np.abs(np.asarray(jacobian)).sum(axis=-1)  # (output place, input place)
    assert (influence[np.triu_indices(tokens.shape[1], 1)] == 0).all()
    assert (influence[np.tril_indices(tokens.shape[1])] > 0).all()


@pytest.mark.parametrize("implementation", ["plain", "splash"])
def test_attention_never_leaves_its_segment(implementation):
    """A fused kernel that ignores segment ids mixes documents without an error: maxtext#4476."""
    length = 128  # splash works in blocks of 128
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 2, 8)) for i in range(3))
    ids = jnp.asarray(np.arange(length) >= 50, jnp.int32)[None] + 1
    run = jax.jit(functools.partial(attend, implementation=implementation))
    out = run(q, k, v, ids)
    moved = [x.at[:, :50].add(1.0) for x in (q, k, v)]
    assert np.abs(run(*moved, ids) - out)[:, :50].max() > 0.1
    np.testing.assert_array_equal(run(*moved, ids)[:, 50:], out[:, 50:])


@pytest.mark.parametrize(("segments", "length"), [(False, 128), (True, 128), (False, 640)])
def test_splash_equals_plain_attention_and_its_gradients(segments, length):
    """640 is no multiple of the largest block, 512."""
    q = jax.random.normal(jax.random.key(0), (2, length, 4, 8))
    k, v = (jax.random.normal(jax.random.key(i), (2, length, 2, 8)) for i in (1, 2))
    ids = jnp.asarray(np.arange(length) >= 77, jnp.int32)[None].repeat(2, 0) if segments else None

    def run(implementation):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v, ids, implementation=implementation)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), run("plain"), run("splash"))


def test_unsupported_attention_settings_are_refused():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ConfigError, match="segment ids"):
        attend(x, x, x, jnp.ones((1, 4), jnp.int32), implementation="cudnn")
    with pytest.raises(ConfigError, match="did you mean plain"):
        attend(x, x, x, None, implementation="plian")
    with pytest.raises(ConfigError, match="multiple of 128 tokens, not of 4: take another model"):
        attend(x, x, x, None, implementation="splash")
    assert set(IMPLEMENTATIONS) == {"plain", "cudnn", "splash"}


@pytest.mark.parametrize(
    ("platform", "dtype", "segmented", "length", "backend"),
    [
        ("tpu", "bfloat16", False, 256, "splash"),
        ("tpu", "float32", True, 256, "splash"),
        ("tpu", "bfloat16", False, 200, "plain"),  # splash works in blocks of 128
        ("gpu", "bfloat16", False, 4, "cudnn"),
        ("gpu", "bfloat16", True, 4, "plain"),  # cuDNN's kernels do not keep documents apart
        ("gpu", "float32", False, 4, "plain"),  # cuDNN's kernels are for 16 bits
        ("cpu", "bfloat16", False, 4, "plain"),
    ],
)
def test_fused_attention_is_the_kernel_of_the_platform(platform, dtype, segmented, length, backend, monkeypatch):
    assert choose(platform, dtype, segmented, length) == backend
    chosen = []
    for name in IMPLEMENTATIONS:
        monkeypatch.setitem(IMPLEMENTATIONS, name, lambda *_, name=name: chosen.append(name))
    devices = np.array([SimpleNamespace(platform=platform)])
    placement = SimpleNamespace(mesh=SimpleNamespace(devices=devices))
    x = jnp.zeros((1, length, 2, 8), dtype)
    attend(x, x, x, jnp.ones((1, length)) if segmented else None, implementation="fused", placement=placement)
    assert chosen == [backend]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_padding_give_finite_outputs_and_gradients(dtype):
    """A query with nothing to attend to gives NaN: pytorch/pytorch#131060, huggingface/transformers#26137."""
    config = with_fields(TINY, dtype=dtype)
    batch = random_batch(config, segments=True)
    batch = {**batch, "weights": np.zeros_like(batch["weights"]), "segment_ids": np.zeros_like(batch["segment_ids"])}
    loss, grads = jax.jit(jax.value_and_grad(lambda p: loss_sums(p, batch, config)[0]))(random_params(config))
    assert loss == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norm_is_exact_for_a_large_mean(norm):
    """The variance as E[x^2] - E[x]^2 cancels: patrick-kidger/equinox#314, keras-team/keras-core#866."""
    config = with_fields(TINY, norm=norm, embed_dim=256, norm_eps=1e-8)
    x = 300 + 0.01 * np.random.default_rng(0).standard_normal((4, 8, 256)).astype(np.float32)
    layer = Norm(config)
    params = {"params": {"scale": jnp.ones(256), **({"bias": jnp.zeros(256)} if norm == "layernorm" else {})}}
    out, grads = jax.jit(jax.value_and_grad(lambda x: jnp.sum(layer.apply(params, x) ** 3), has_aux=False))(x)
    exact = reference.norm(np.float64(x), {"scale": np.ones(256), "bias": np.zeros(256)}, config)
    np.testing.assert_allclose(layer.apply(params, x), exact, atol=0.05)
    assert np.isfinite(grads).all()
    assert np.isfinite(out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_position_tables_are_float32_whatever_the_dtype(dtype):
    """Angles in bfloat16 are the same for neighbouring positions above 256: EleutherAI/gpt-neox#1003."""
    config = with_fields(TINY, dtype=dtype, head_dim=128, max_length=2048, position="rope")
    tables = rotation(config, jnp.arange(2048)[None])
    angle = np.arange(2048)[:, None] * 10_000.0 ** (-np.arange(0, 128, 2) / 128)
    assert tables.query_cos.dtype == jnp.float32
    np.testing.assert_allclose(tables.query_cos[0, :, 0, ::2], np.cos(angle), atol=5e-4)
    np.testing.assert_allclose(tables.key_sin[0, :, 0, 1::2], np.sin(angle), atol=5e-4)


def test_xpos_scales_around_a_fixed_centre():
    """The centre is max_length // 2, however long the sequence is."""
    config = with_fields(TINY, head_dim=4, max_length=16, xpos_scale_base=2.0)
    long, short = (rotation(config, jnp.arange(n)[None]) for n in (16, 10))
    for full, part in zip(long, short, strict=True):
        np.testing.assert_array_equal(full[:, :10], part)
    scale = np.hypot(long.query_cos, long.query_sin)[0, :, 0]
    np.testing.assert_allclose(scale[8], 1.0, rtol=1e-6)  # the centre, max_length // 2
    np.testing.assert_allclose(scale[10], [2 / 7, 2 / 7, 9 / 14, 9 / 14], rtol=1e-6)  # zeta of pairs 0 and 1, K = 4
    np.testing.assert_allclose(np.hypot(long.key_cos, long.key_sin)[0, :, 0], 1 / scale, rtol=1e-5)


def test_padded_ids_have_no_probability_and_no_gradient():
    assert TINY.padded_vocab_size == 64
    params, batch = random_params(TINY), random_batch(TINY)
    logits, _ = jax_model(TINY, params, batch)
    assert (jax.nn.softmax(logits)[..., 61:] == 0).all()
    grads = jax.jit(jax.grad(lambda p: loss_sums(p, batch, TINY)[0]))(params)
    assert np.abs(grads["embedding"][:61]).min(axis=0).max() > 0
    assert (np.asarray(grads["embedding"])[61:] == 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_do_not_depend_on_padding(tied):
    """The untied head was drawn as (D, V): with another padding every word started from other weights."""
    narrow, wide = (with_fields(TINY, tied_embedding=tied, vocab_multiple=n) for n in (1, 48))
    assert narrow.padded_vocab_size < wide.padded_vocab_size
    few, many = (jax.jit(functools.partial(init_params, c))(jax.random.key(0)) for c in (narrow, wide))

    def check(path, leaf, a, b):
        real = tuple(slice(0, narrow.vocab_size) if name == "vocab" else slice(None) for name in leaf.names)
        np.testing.assert_array_equal(a[real], b[real], err_msg=path)

    map_with_axes(check, abstract_params(narrow)[1], few, many)


def test_tied_xpos_model_is_alive_at_initialisation():
    grads = jax.jit(jax.grad(lambda p: loss_sums(p, random_batch(TINY), TINY)[0]))(init_params(TINY, jax.random.key(0)))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_parameters_are_counted_by_hand():
    # table 64 x 32; a layer: 4 projections 32 x 32 + 32, mlp 2 x 32 x 48 + 48 + 32, two norms of 2 x 32; final norm
    by_hand = 64 * 32 + 2 * (4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32 + 4 * 32) + 2 * 32
    assert count_parameters(abstract_params(TINY)[0]) == by_hand
