"""One update: sums, clipping, decay, skipping, schedules, dropout."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, random_batch, random_params, with_fields

from flmjax.config import GrowthConfig, OptimizerConfig, RunConfig, StageConfig, resize
from flmjax.growth.masks import Ramp, masked
from flmjax.growth.optimizer_state import AdamState
from flmjax.model.axes import map_with_axes
from flmjax.training import loop, losses
from flmjax.training.losses import cross_entropy_sum
from flmjax.training.optimizer import learning_rate, make_optimizer, new_warmup
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import accumulate, compile_step, gradients, nonfinite_leaves, put_batch


@pytest.fixture(scope="module")
def spec(one_device_mesh):
    return state_spec(TINY, OptimizerConfig(), one_device_mesh)


@pytest.fixture(scope="module")
def step(spec):
    return compile_step(spec, 1)


def adam(state):
    return next(s for s in state.opt_state if isinstance(s, AdamState)).adam


def test_accumulated_loss_is_the_mean_over_tokens():  # case B01
    # Microbatch rows 0, 2 and 1, 3: 3 loss tokens at 2.0, 13 at 1.0; means of means would give 1.5
    values = np.where(np.arange(4) % 2 == 0, 2.0, 1.0)[:, None] * np.ones((4, 8), np.float32)
    weights = np.zeros((4, 8), np.float32)
    weights[0, :3], weights[1, :8], weights[3, :5] = 1, 1, 1

    def value_and_grad(params, batch, key):
        sums = {"loss": jnp.sum(batch["values"] * batch["weights"]), "weight": jnp.sum(batch["weights"])}
        return sums, params

    sums, _ = accumulate(value_and_grad, 2)(jnp.zeros(()), {"values": values, "weights": weights}, jax.random.key(0))
    assert sums["loss"] / sums["weight"] == 1.1875


def test_accumulated_gradient_is_that_of_the_whole_batch():  # cases B01, B02
    params, batch = random_params(TINY), random_batch(TINY, rows=8)
    batch["weights"][1::4] = 0  # with four microbatches one has no weighted target at all
    assert len(set(batch["weights"].reshape(2, 4, -1).sum(axis=(0, 2)))) == 4
    run = jax.jit(functools.partial(gradients, config=TINY, placement=None), static_argnames="microbatches")
    key = jax.random.key(0)
    whole = run(params, batch, key, microbatches=1)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(whole[1]))
    for k in (2, 4):
        parts = run(params, batch, key, microbatches=k)
        chex.assert_tree_all_finite(parts)
        chex.assert_trees_all_close(parts[1], whole[1], rtol=0, atol=1e-6 * largest)
        chex.assert_trees_all_close(parts[0], whole[0], rtol=1e-6)


def test_loss_of_bfloat16_states_is_float32_and_exact():  # case D01
    config = with_fields(TINY, vocab_size=1000, dtype="bfloat16")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, 32)) * 3, jnp.bfloat16)
    table = jnp.asarray(rng.standard_normal((1000, 32)), jnp.bfloat16)
    targets = rng.integers(0, 1000, (2, 8))
    loss = cross_entropy_sum(x, table, targets, jnp.ones((2, 8)), config)
    logits = np.einsum("bld,vd->blv", np.float64(x), np.float64(table))
    top = np.log(np.exp(logits).sum(-1))
    exact = (top - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).sum()
    assert loss.dtype == jnp.float32
    assert abs(float(loss) - exact) / 16 < 1e-3


def test_small_updates_add_up_under_bfloat16_compute(one_device_mesh):  # case D03
    config = with_fields(TINY, dtype="bfloat16")
    spec = state_spec(config, OptimizerConfig(weight_decay=1.0, clip_norm=None), one_device_mesh)
    state = init_state(spec, 0)
    state = state.replace(params=jax.tree.map(jnp.ones_like, state.params))
    run = compile_step(spec, 1)
    batch = {**random_batch(config), "weights": np.zeros((4, 16), np.float32)}  # no gradient: decay alone
    for _ in range(100):
        state, _ = run(state, batch, np.float32(6e-4))
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(kernel, (1 - 6e-4) ** 100, rtol=1e-5)  # 0.942; bfloat16 storage stays at 1
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, adam(state).mu, adam(state).nu))} == {
        np.dtype("float32")
    }


def test_decay_touches_matrices_alone(spec, step):  # case D05
    state = init_state(spec, 0)
    before = jax.tree.map(lambda x: np.asarray(x) + 0.5, state.params)
    state = state.replace(params=jax.tree.map(jnp.asarray, before))
    batch = {**random_batch(TINY), "weights": np.zeros((4, 16), np.float32)}
    after = step(state, batch, np.float32(0.1))[0].params

    def check(path, axes, a, b):
        expected = a * (1 - 0.1 * 0.1) if path.split("/")[-1] in ("kernel", "embedding", "head") else a
        np.testing.assert_allclose(b, expected, rtol=1e-6, err_msg=path)
        if path.split("/")[-1] in ("bias", "scale"):
            np.testing.assert_array_equal(a, b, err_msg=path)

    map_with_axes(check, spec.axes, before, after)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_nonfinite_gradient_keeps_the_state_and_is_named(spec, step, value):  # case D04
    state = init_state(spec, 0)
    for i in range(4):
        state, metrics = step(state, random_batch(TINY, seed=i), np.float32(1e-3))
    assert int(metrics["nonfinite"]) == 0
    before = jax.tree.map(np.asarray, state)
    bad = random_batch(TINY, seed=5)
    bad["weights"][0, 0] = value
    state, metrics = step(state, bad, np.float32(1e-3))
    chex.assert_trees_all_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert int(state.step) == 5
    assert int(metrics["nonfinite"]) == int(state.nonfinite) == 1
    assert "final_norm/scale" in nonfinite_leaves(np.asarray(metrics["finite"]), state.params)
    state, metrics = step(state, random_batch(TINY, seed=6), np.float32(1e-3))
    assert int(state.nonfinite) == 0
    assert int(adam(state).count) == 5  # of 6 updates one was skipped


def test_one_spoilt_leaf_is_named_alone(spec):
    finite = np.ones(len(jax.tree.leaves(spec.abstract.params)), bool)
    paths = nonfinite_leaves(~finite, spec.abstract.params)
    finite[paths.index("layers/mlp/up/kernel")] = False
    assert nonfinite_leaves(finite, spec.abstract.params) == ["layers/mlp/up/kernel"]


def test_clipping_bounds_the_norm(spec):
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 3.0), spec.abstract.params)
    clip = make_optimizer(OptimizerConfig(weight_decay=0.0, clip_norm=0.5), TINY, spec.axes)
    _, state = jax.jit(lambda g: clip.update(g, clip.init(g), g))(grads)
    moments = next(s for s in state if isinstance(s, AdamState)).adam.mu
    assert abs(float(optax.tree.norm(moments)) / 0.1 - 0.5) < 1e-5


def test_learning_rate_counts_updates_over_all_stages(spec, one_device_mesh):  # case E01
    own = GrowthConfig(learning_rate="stage")
    stages = (
        StageConfig(name="a", steps=10, learning_rate=1.0, warmup_steps=4, final_learning_rate=0.1),
        StageConfig(name="b", steps=10, learning_rate=0.5, schedule="wsd", decay_fraction=0.4, growth=own),
        StageConfig(name="c", steps=2, learning_rate=0.3, schedule="constant", growth=own),
    )
    rates = [learning_rate(stages, i) for i in range(22)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    np.testing.assert_allclose(rates[4:10], cosine, rtol=1e-6)
    np.testing.assert_allclose(rates[10:20], [0.5] * 7 + [0.375, 0.25, 0.125], rtol=1e-6)
    np.testing.assert_allclose(rates[20:], 0.3)
    with pytest.raises(ValueError, match="schedule ends"):
        learning_rate(stages, 22)
    run = compile_step(spec, 4)
    state = init_state(spec, 0)
    for i in range(10):
        state, _ = run(state, random_batch(TINY, seed=i), np.float32(rates[i]))
    assert int(adam(state).count) == int(state.step) == 10


def test_learning_rate_after_growth_follows_its_policy():
    def rates(policy, **growth):
        after = GrowthConfig(learning_rate=policy, **growth)
        first = StageConfig(name="a", steps=4, learning_rate=1.0, warmup_steps=2, schedule="cosine")
        stages = (first, StageConfig(name="b", steps=4, growth=after), StageConfig(name="c", steps=2, growth=after))
        return [learning_rate(stages, i) for i in range(10)]

    def cosine(n, length):
        return (1 + math.cos(math.pi * n / length)) / 2

    whole = [0.5, 1.0, *[cosine(i, 8) for i in range(8)]]
    np.testing.assert_allclose(rates("continue"), whole, rtol=1e-5)
    warmed = [*whole[:4], whole[4] / 2, *whole[5:]]  # two of the stage's four updates; one of the last stage's two
    np.testing.assert_allclose(rates("rewarm", rewarm_fraction=0.5), warmed, rtol=1e-5)
    rewound = [*whole[:4], *[cosine(i, 6) for i in range(4)], 1.0, cosine(1, 2)]
    np.testing.assert_allclose(rates("rewind"), rewound, rtol=1e-5)


def test_mup_scales_matrices_inside_the_blocks(one_device_mesh):
    """m = 4: their init std falls by 2, their rate by 4; rate x decay stays. Nothing else changes."""
    config = with_fields(TINY, base_embed_dim=8, tied_embedding=False)
    plain = state_spec(with_fields(config, base_embed_dim=None), OptimizerConfig(), one_device_mesh)
    spec = state_spec(config, OptimizerConfig(), one_device_mesh)
    state, standard = init_state(spec, 0), init_state(plain, 0)
    before = jax.tree.map(np.asarray, state.params)
    after, _ = compile_step(spec, 1)(state, random_batch(config), np.float32(1e-3))

    def check(path, leaf, a, b, standard):
        hidden = "layers/attention" in path or "layers/mlp" in path
        hidden = hidden and path.endswith("kernel")
        np.testing.assert_allclose(a * (2 if hidden else 1), standard, rtol=1e-6, err_msg=path)
        update = np.abs(a - np.asarray(b) - 1e-3 * 0.1 * a * leaf.is_matrix)
        assert np.quantile(update, 0.9) == pytest.approx(1e-3 / (4 if hidden else 1), rel=0.02) or "key/bias" in path, (
            path
        )

    map_with_axes(check, spec.axes, before, after.params, standard.params)


def test_weights_that_growth_made_warm_up_alone():
    stage = StageConfig(steps=1000, growth=GrowthConfig(new_warmup_fraction=0.02))
    assert new_warmup(stage) == 20
    assert new_warmup(StageConfig(steps=1000)) == 10


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_masked_step_is_a_step_of_the_masked_model(microbatches, one_device_mesh):
    """By hand: gradient through masked(), clip, Adam, decay; c is that of the step."""
    new = resize(TINY, "mask", embed_dim=40, num_layers=3)
    config = OptimizerConfig(clip_norm=None)
    spec = state_spec(new, config, one_device_mesh)
    ramp = Ramp(GrowthConfig("mask", ramp_steps=10), TINY, new, start=2)
    state = dataclasses.replace(init_state(spec, 0), step=jnp.int32(5))
    params, batch = jax.tree.map(np.asarray, state.params), random_batch(new)

    def mean_loss(p):
        return losses.loss_sums(masked(p, TINY, new, 0.3), batch, new)[0] / batch["weights"].sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    after, metrics = compile_step(spec, microbatches, ramp=ramp)(state, batch, np.float32(1e-3))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    moments = adam(after).mu
    chex.assert_trees_all_close(moments, jax.tree.map(lambda g: 0.1 * g, gradient), rtol=1e-4, atol=1e-8)


def test_a_stage_leaves_its_mask_behind(one_device_mesh, monkeypatch):
    """From the ramp's end on, the step is the plain one, to the letter of its program."""
    mask = GrowthConfig("mask", ramp_steps=2)
    stages = (StageConfig(name="a", steps=3), StageConfig(name="b", steps=4, growth=mask, embed_dim=40))
    config = RunConfig(model=TINY, stages=stages)
    model = config.stage_models[1]
    spec = state_spec(model, OptimizerConfig(), one_device_mesh)
    texts = []

    def lowered(*args, **kwargs):
        step = compile_step(*args, **kwargs)

        def spy(state, batch, rate):
            texts.append(step.lower(state, batch, rate).as_text())
            return step(state, batch, rate)

        return spy

    monkeypatch.setattr(loop, "compile_step", lowered)
    rows = ({k: v for k, v in random_batch(model, seed=i).items() if k != "bytes"} for i in range(9))
    data = SimpleNamespace(tokenizer=SimpleNamespace(token_bytes=np.ones(61, np.float32)))
    for at, masked_steps in ((3, 2), (4, 1), (5, 0)):
        texts.clear()
        state = dataclasses.replace(init_state(spec, 0), step=jnp.int32(at))
        assert [step for step, _, _ in loop.run_stage(state, spec, config, 1, rows, data)] == list(range(at + 1, 8))
        plain = compile_step(spec, 1).lower(*plain_arguments(spec, model)).as_text()
        assert [text == plain for text in texts] == [False] * masked_steps + [True] * (7 - at - masked_steps)


def plain_arguments(spec, model):
    rows = {k: v for k, v in random_batch(model).items() if k != "bytes"}
    return init_state(spec, 0), put_batch(rows, np.ones(61, np.float32), spec.mesh), np.float32(0)


def test_dropout_goes_on_as_if_never_stopped(one_device_mesh):  # case E02
    spec = state_spec(with_fields(TINY, dropout=0.1), OptimizerConfig(), one_device_mesh)
    run = compile_step(spec, 1)
    batch = random_batch(TINY)
    state, losses = init_state(spec, 0), []
    for i in range(6):
        if i == 3:
            middle = jax.tree.map(np.asarray, state)
        state, metrics = run(state, batch, np.float32(0.0))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 6  # another mask every step, though nothing is learnt
    resumed, again = jax.tree.map(jnp.asarray, middle), []
    for _ in range(3):
        resumed, metrics = run(resumed, batch, np.float32(0.0))
        again.append(float(metrics["loss"]))
    assert again == losses[3:]


def test_bits_per_byte_are_counted_from_the_targets(spec, step, one_device_mesh):
    batch = random_batch(TINY)
    token_bytes = np.arange(61, dtype=np.float32)
    placed = put_batch({k: v for k, v in batch.items() if k != "bytes"}, token_bytes, one_device_mesh)
    _, metrics = step(init_state(spec, 0), placed, np.float32(0.0))
    total = float(metrics["loss"]) * batch["weights"].sum() / math.log(2)
    by_hand = total / (batch["targets"] * batch["weights"]).sum()
    np.testing.assert_allclose(float(metrics["bits_per_byte"]), by_hand, rtol=1e-5)


@pytest.mark.parametrize("chunks", [1, 4])
def test_gradient_of_the_loss_is_that_of_its_plain_formula(chunks, monkeypatch):
    monkeypatch.setattr(losses, "_num_chunks", lambda *_: chunks)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 16, 32)), jnp.float32)
    table = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)  # 61 ids and three rows of padding
    batch = random_batch(TINY, rows=3)

    def plain(x, table):
        log_probs = jax.nn.log_softmax((x @ table.T)[..., :61])
        picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch["weights"])

    def ours(x, table):
        return 3.0 * cross_entropy_sum(x, table, batch["targets"], batch["weights"], TINY)

    loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, table)
    expected, expected_gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, table)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, 3 * wanted, rtol=0, atol=2e-6 * 3 * np.abs(wanted).max())
