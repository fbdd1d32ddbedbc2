"""Growth keeps the function: in float64 against the NumPy model, with random, non-trivial leaves everywhere."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import TINY, random_batch, random_params, with_fields
from hypothesis import given, settings
from hypothesis import strategies as st

from flmjax.config import ConfigError, OptimizerConfig, resize
from flmjax.growth import operators
from flmjax.growth.certificate import certify
from flmjax.growth.grow import check_growth, grow, grow_params
from flmjax.growth.operators import GrowthError, Rule
from flmjax.model.axes import map_with_axes
from flmjax.model.transformer import abstract_params
from flmjax.training.losses import loss_sums
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import compile_step

GROWN = with_fields(TINY, embed_dim=24, num_heads=4, head_dim=6, mlp_dim=29, max_length=8, norm_eps=1e-2)
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
BLOCKS = {
    "layernorm_tied": {},
    "layernorm_untied": {"tied_embedding": False, "position": "learned"},
    "rmsnorm_tied": {"norm": "rmsnorm", "position": "rope", "bias": False},
    "rmsnorm_untied_swiglu": {"norm": "rmsnorm", "tied_embedding": False, "activation": "swiglu", "bias": False},
}
AXES = {
    "embed": ({}, {"embed_dim": 37}),
    "mlp": ({}, {"mlp_dim": 41}),
    "heads": ({}, {"num_heads": 7}),
    "layers": ({}, {"num_layers": 5}),
    "query_heads_of_each_group": (GROUPED, {"num_heads": 6, "num_kv_heads": 2}),
    "groups": (GROUPED, {"num_heads": 6, "num_kv_heads": 3}),
    "all": ({}, {"embed_dim": 37, "mlp_dim": 31, "num_heads": 5, "num_layers": 3}),
    "all_grouped": (
        GROUPED,
        {"embed_dim": 53, "mlp_dim": 30, "num_heads": 9, "num_kv_heads": 3, "num_layers": 4},
    ),
}


def grow64(params, old, new, seed=9):
    """Grown parameters in float64."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        grown = jax.jit(lambda p: grow_params(p, old, new, "zero", jax.random.key(seed)))(double)
        return jax.tree.map(np.asarray, grown)


def error(params, grown, old, new):
    """max |difference| of logits over max |logit|, in float64."""
    tokens = random_batch(old, rows=2)["tokens"]
    before, after = reference.logits(params, old, tokens), reference.logits(grown, new, tokens)
    real = np.s_[..., : old.vocab_size]
    return np.abs(before - after)[real].max() / np.abs(before[real]).max()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("block", BLOCKS)
def test_growth_is_exact(block, axis):
    start, sizes = AXES[axis]
    old = with_fields(GROWN, **BLOCKS[block], **start)
    new = resize(old, **sizes)
    params = random_params(old, spread=0.3)
    grown = grow64(params, old, new)
    chex.assert_trees_all_equal_shapes(grown, abstract_params(new)[0])
    assert error(params, grown, old, new) <= 1e-12


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(sorted(BLOCKS)),
    st.tuples(*[st.integers(1, 13)] * 4),
    st.tuples(*[st.integers(0, 13)] * 4),
)
def test_growth_is_exact_at_any_size(block, sizes, steps):
    names = ("num_layers", "embed_dim", "num_heads", "mlp_dim")
    old = with_fields(GROWN, **BLOCKS[block], **dict(zip(names, sizes, strict=True)), vocab_size=13, head_dim=2)
    new = resize(old, **{name: a + b for name, a, b in zip(names, sizes, steps, strict=True)})
    params = random_params(old, spread=0.3)
    assert error(params, grow64(params, old, new), old, new) <= 1e-12


@pytest.mark.parametrize("block", ["layernorm_tied", "rmsnorm_untied_swiglu"])
def test_growth_in_steps_keeps_the_function_in_any_order(block):
    old = with_fields(GROWN, **BLOCKS[block])
    params = random_params(old, spread=0.3)
    for order in (("embed_dim", "num_layers", "mlp_dim"), ("num_layers", "mlp_dim", "embed_dim")):
        sizes = {"embed_dim": 30, "num_layers": 3, "mlp_dim": 33}
        config, grown = old, params
        for name in order:
            bigger = resize(config, **{name: sizes[name]})
            grown = grow64(grown, config, bigger)
            config = bigger
        assert error(params, grown, old, config) <= 1e-12


WRONG = {
    "zero pad of an uncentred LayerNorm stream": lambda leaf, *_: Rule("zero"),
    "mean fill without the gain's factor": lambda leaf, *_: Rule(
        {"write": "mean", "read": "fresh", "scale": "fresh", "shift": "zero"}[leaf.role("embed")]
    ),
    "fresh writers": lambda leaf, old, new: operators.zero_embed(leaf, old, new)._replace(fill="fresh"),
}


@pytest.mark.parametrize("recipe", WRONG)
def test_wrong_width_recipes_are_found(recipe, monkeypatch):
    monkeypatch.setattr(operators, "FAMILIES", {"zero": {**operators.FAMILIES["zero"], "embed": WRONG[recipe]}})
    new = resize(GROWN, embed_dim=37)
    params = random_params(GROWN, spread=0.3)
    assert error(params, grow64(params, GROWN, new), GROWN, new) > 1e-3


def test_unscaled_epsilon_is_found():
    new = resize(GROWN, embed_dim=37)
    params = random_params(GROWN, spread=0.3)
    grown = grow64(params, GROWN, new)
    assert error(params, grown, GROWN, with_fields(new, norm_eps=GROWN.norm_eps)) > 1e-3


def test_certificate_stops_a_growth_that_is_not_exact(monkeypatch):
    new = resize(GROWN, embed_dim=37, num_layers=3)
    params, batch = random_params(GROWN), random_batch(GROWN, rows=2)
    key = jax.random.key(0)
    labels = {"step": 5, "from_stage": "a", "to_stage": "b", "tolerance": 1e-4}

    def certificate():
        grown = jax.jit(lambda p: grow_params(p, GROWN, new, "zero", key))(params)
        return certify(params, grown, GROWN, new, batch, family="zero", key=key, **labels)

    good = certificate()
    good.check()
    assert good.max_difference["float32"] <= 1e-4
    assert good.max_difference["float64"] <= 1e-10
    assert good.sizes == {"num_layers": (2, 3), "embed_dim": (24, 37)}
    assert abs(good.loss_before - reference.loss(params, GROWN, batch)[0] / batch["weights"].sum()) < 1e-4
    fresh_layers = {**operators.FAMILIES["zero"], "layers": lambda *_: Rule("fresh")}
    monkeypatch.setattr(operators, "FAMILIES", {"zero": fresh_layers})
    with pytest.raises(GrowthError, match=r"a -> b by 'zero' is not exact.*float32 logits"):
        certificate().check()


def test_certificate_is_made_in_the_runs_dtype_too():
    old = with_fields(GROWN, dtype="bfloat16")
    new = resize(old, embed_dim=48)
    params, key = random_params(old), jax.random.key(0)
    grown = jax.jit(lambda p: grow_params(p, old, new, "zero", key))(params)
    labels = {"step": 1, "from_stage": "a", "to_stage": "b", "tolerance": 1e-4}
    found = certify(params, grown, old, new, random_batch(old), family="zero", key=key, float64_below=0, **labels)
    assert found.run_dtype == "bfloat16"
    assert found.max_difference["float32"] <= 1e-4 < found.max_difference["run"]
    assert found.max_difference["float64"] is None


@pytest.mark.parametrize("block", ["layernorm_tied", "rmsnorm_untied_swiglu"])
def test_gradient_pulled_back_through_growth_is_the_old_gradient(block):
    """f_new(grow(p)) = f_old(p) for every p, so the chain rule gives back the old gradient, leaf by leaf."""
    old = with_fields(GROWN, **BLOCKS[block], dtype="float64")
    new = resize(old, embed_dim=29, mlp_dim=31, num_heads=5, num_layers=3)
    batch = random_batch(old)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(old))

        def both(params):
            grown, pull_back = jax.vjp(lambda p: grow_params(p, old, new, "zero", jax.random.key(0)), params)
            new_gradient = jax.grad(lambda p: loss_sums(p, batch, new)[0])(grown)
            return jax.grad(lambda p: loss_sums(p, batch, old)[0])(params), pull_back(new_gradient)[0]

        expected, found = jax.jit(both)(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


def trained_state(config, mesh, steps=20, learning_rate=3e-3):
    spec = state_spec(config, OptimizerConfig(), mesh)
    state = init_state(spec, 0)
    step = compile_step(spec, 1)
    for i in range(steps):
        state, _ = step(state, random_batch(config, seed=i), np.float32(learning_rate))
    return spec, state


@pytest.fixture(scope="module")
def grown_state(one_device_mesh):
    """A trained state, grown on every axis."""
    old = with_fields(GROWN, norm_eps=1e-5)
    new = resize(old, embed_dim=37, mlp_dim=31, num_heads=6, num_layers=3)
    _, state = trained_state(old, one_device_mesh)
    grown = jax.jit(lambda s: grow(s, old, new, "zero", jax.random.key(3)))(state)
    return old, new, state, grown, state_spec(new, OptimizerConfig(), one_device_mesh)


def adam(state):
    return next(s for s in state.opt_state if isinstance(s, optax.ScaleByAdamState))


def test_moments_grow_by_the_rule_of_their_weights(grown_state):  # case G04
    old, new, state, grown, _ = grown_state
    chex.assert_trees_all_equal_structs(adam(grown).mu, grown.params)
    assert int(adam(grown).count) == int(adam(state).count) == 20
    assert int(grown.step) == 20
    gain = np.sqrt(old.embed_dim / new.embed_dim)

    def check(path, leaf, before, after, power):
        old_part = np.asarray(after)[tuple(slice(0, n) for n in before.shape)]
        factor = gain**-power if leaf.role("embed") == "scale" else 1.0
        np.testing.assert_allclose(old_part, np.asarray(before) * factor, rtol=1e-6, err_msg=path)
        total = np.abs(np.asarray(after, np.float64)).sum()
        np.testing.assert_allclose(total, np.abs(np.float64(old_part)).sum(), rtol=1e-9, err_msg=path)  # new ones are 0

    axes = abstract_params(old)[1]
    map_with_axes(functools.partial(check, power=1), axes, adam(state).mu, adam(grown).mu)
    map_with_axes(functools.partial(check, power=2), axes, adam(state).nu, adam(grown).nu)


def test_first_update_of_new_weights_stays_below_the_learning_rate(grown_state):
    old, _, _, grown, spec = grown_state
    rate = 1e-3
    before = jax.tree.map(np.asarray, grown.params)
    after, _ = compile_step(spec, 1)(jax.tree.map(jnp.copy, grown), random_batch(old, seed=99), np.float32(rate))
    kernel, moved = before["layers"]["mlp"]["down"]["kernel"], after.params["layers"]["mlp"]["down"]["kernel"]
    update = np.abs(np.asarray(moved) - kernel)[: old.num_layers, old.mlp_dim :, : old.embed_dim]
    assert 0.3 * rate < update.max() <= rate  # 0.45 at b1 = 0.9, b2 = 0.95 and a large count


def test_everything_new_learns_within_two_steps(grown_state):
    old, _, _, grown, spec = grown_state
    step = compile_step(spec, 1)
    before = jax.tree.map(np.asarray, grown.params)
    state = jax.tree.map(jnp.copy, grown)
    for i in range(2):
        state, _ = step(state, random_batch(old, rows=8, seed=i), np.float32(1e-2))

    def check(path, leaf, a, b):
        if path.endswith("embedding"):  # rows of padded and of unseen ids do not move
            a, b = a[:61], b[:61]
        assert (np.asarray(a) != np.asarray(b)).mean() > 0.95, path

    map_with_axes(check, abstract_params(old)[1], before, state.params)


def test_loss_does_not_jump_after_growth(one_device_mesh):  # case G02
    config = with_fields(GROWN, norm_eps=1e-5)
    rng = np.random.default_rng(0)
    successor = rng.integers(0, 61, (61, 3))  # a language of 61 words, three of which may follow each

    def batch(seed, rows=64):
        rng = np.random.default_rng(seed)
        tokens = np.zeros((rows, config.max_length + 1), np.int32)
        tokens[:, 0] = rng.integers(0, 61, rows)
        for i in range(config.max_length):
            tokens[:, i + 1] = successor[tokens[:, i], rng.integers(0, 3, rows)]
        ones = np.ones((rows, config.max_length), np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones, "bytes": ones[:, 0]}

    held_out = batch(10**6, rows=256)
    spec = state_spec(config, OptimizerConfig(), one_device_mesh)
    state = init_state(spec, 0)
    step = compile_step(spec, 1)
    for i in range(300):
        state, _ = step(state, batch(i), np.float32(2e-3))
    weight = held_out["weights"].sum()
    before = float(jax.jit(lambda p: loss_sums(p, held_out, config)[0])(state.params)) / weight
    new = resize(config, embed_dim=37, mlp_dim=48, num_heads=6, num_layers=3)
    spec = state_spec(new, OptimizerConfig(), one_device_mesh)
    state = jax.jit(lambda s: grow(s, config, new, "zero", jax.random.key(1)), out_shardings=spec.shardings)(state)
    step, evaluate = compile_step(spec, 1), jax.jit(lambda p: loss_sums(p, held_out, new)[0])
    losses = []
    for i in range(300, 350):
        state, _ = step(state, batch(i), np.float32(2e-3))
        losses.append(float(evaluate(state.params)) / weight)
    assert before < 2.0  # it has learnt something: 61 words are 4.1 nats
    assert max(losses) <= before + 0.05
    assert losses[-1] <= before


def test_illegal_growth_is_refused():
    grouped = with_fields(GROWN, num_heads=8, num_kv_heads=2)
    for old, new, words in (
        (GROWN, resize(GROWN, embed_dim=23), "embed_dim would shrink from 24 to 23"),
        (GROWN, resize(GROWN, num_layers=1), "num_layers would shrink from 2 to 1"),
        (GROWN, with_fields(GROWN, activation="swiglu"), "cannot change activation from gelu to swiglu"),
        (GROWN, with_fields(GROWN, embed_dim=30), "norm_eps must be"),
        (grouped, resize(grouped, num_heads=9, num_kv_heads=3), "query heads per key head would shrink from 4 to 3"),
    ):
        with pytest.raises(GrowthError, match=words):
            check_growth(old, new)
    with pytest.raises(ConfigError, match="growth family 'zeros'; did you mean zero"):
        grow_params(random_params(GROWN), GROWN, resize(GROWN, mlp_dim=40), "zeros", jax.random.key(0))


def test_leaf_without_a_rule_is_named(monkeypatch):
    monkeypatch.setattr(operators, "FAMILIES", {"zero": {}})
    with pytest.raises(
        GrowthError, match=r"layers/mlp/\w+/\w+ \(.*\) -> \(.*\): family 'zero' has no rule for axis 'mlp'"
    ):
        grow_params(random_params(GROWN), GROWN, resize(GROWN, mlp_dim=40), "zero", jax.random.key(0))
