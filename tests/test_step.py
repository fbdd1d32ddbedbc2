"""One update: sums, clipping, decay, skipping, schedules, dropout, teachers."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, random_batch, random_params, with_fields

from flmjax.config import GrowthConfig, MeshConfig, OptimizerConfig, RunConfig, StageConfig, resize
from flmjax.data.batch import global_batch
from flmjax.evaluation.validation_loss import describe, jit_loss_sums, validation_loss, validation_means
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import Ramp, masked
from flmjax.model import loss as losses
from flmjax.model.loss import cross_entropy_sum, loss_sums, teacher_means, teacher_sums
from flmjax.model.transformer import forward
from flmjax.optimizer.adam import AdamState, make_optimizer
from flmjax.optimizer.schedule import learning_rate, new_warmup
from flmjax.sharding.axes import map_with_axes
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.training import loop
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import (
    accumulate,
    gradients,
    jit_train_step,
    nonfinite_leaves,
)
from flmjax.workdir.metrics import MetricsWriter, read_metrics


@pytest.fixture(scope="module")
def spec(one_device_mesh):
    return state_spec(TINY, OptimizerConfig(), one_device_mesh)


@pytest.fixture(scope="module")
def step(spec):
    return jit_train_step(spec, 1)


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
    loss, _ = cross_entropy_sum(x, table, targets, jnp.ones((2, 8)), config)
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
    run = jit_train_step(spec, 1)
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
    assert int(metrics["skipped_updates"]) == 0
    before = jax.tree.map(np.asarray, state)
    bad = random_batch(TINY, seed=5)
    bad["weights"][0, 0] = value
    state, metrics = step(state, bad, np.float32(1e-3))
    chex.assert_trees_all_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert int(state.step) == 5
    assert int(metrics["skipped_updates"]) == int(state.skipped_updates) == 1
    assert "final_norm/scale" in nonfinite_leaves(np.asarray(metrics["finite"]), state.params)
    state, metrics = step(state, random_batch(TINY, seed=6), np.float32(1e-3))
    assert int(state.skipped_updates) == 0
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
    own = GrowthConfig(rate_policy="stage")
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
    run = jit_train_step(spec, 4)
    state = init_state(spec, 0)
    for i in range(10):
        state, _ = run(state, random_batch(TINY, seed=i), np.float32(rates[i]))
    assert int(adam(state).count) == int(state.step) == 10


def test_learning_rate_after_growth_follows_its_policy():
    def rates(policy, **growth):
        after = GrowthConfig(rate_policy=policy, **growth)
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
    after, _ = jit_train_step(spec, 1)(state, random_batch(config), np.float32(1e-3))

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
    ramp = Ramp(Growth(TINY, new, GrowthConfig("mask", ramp_steps=10)), start=2)
    state = dataclasses.replace(init_state(spec, 0), step=jnp.int32(5))
    params, batch = jax.tree.map(np.asarray, state.params), random_batch(new)

    def mean_loss(p):
        return losses.loss_sums(masked(p, ramp.growth, 0.3), batch, new)[0] / batch["weights"].sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    after, metrics = jit_train_step(spec, microbatches, ramp=ramp)(state, batch, np.float32(1e-3))
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
        step = jit_train_step(*args, **kwargs)

        def spy(state, batch, rate):
            texts.append(step.lower(state, batch, rate).as_text())
            return step(state, batch, rate)

        return spy

    monkeypatch.setattr(loop, "jit_train_step", lowered)
    rows = ({k: v for k, v in random_batch(model, seed=i).items() if k != "bytes"} for i in range(9))
    sharding = batch_sharding(one_device_mesh)
    batches = (global_batch(row, np.ones(61, np.float32), sharding) for row in rows)
    for at, masked_steps in ((3, 2), (4, 1), (5, 0)):
        texts.clear()
        state = dataclasses.replace(init_state(spec, 0), step=jnp.int32(at))
        assert [
            step for step, _, _ in loop.run_stage(state, spec, config.schedule[1], lambda step: 1e-3, batches)
        ] == list(range(at + 1, 8))
        plain = jit_train_step(spec, 1).lower(*plain_arguments(spec, model)).as_text()
        assert [text == plain for text in texts] == [False] * masked_steps + [True] * (7 - at - masked_steps)


def plain_arguments(spec, model):
    rows = {k: v for k, v in random_batch(model).items() if k != "bytes"}
    return init_state(spec, 0), global_batch(rows, np.ones(61, np.float32), batch_sharding(spec.mesh)), np.float32(0)


def test_dropout_goes_on_as_if_never_stopped(one_device_mesh):  # case E02
    spec = state_spec(with_fields(TINY, dropout=0.1), OptimizerConfig(), one_device_mesh)
    run = jit_train_step(spec, 1)
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
    placed = global_batch(
        {k: v for k, v in batch.items() if k != "bytes"}, token_bytes, batch_sharding(one_device_mesh)
    )
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
        return 3.0 * cross_entropy_sum(x, table, batch["targets"], batch["weights"], TINY)[0]

    loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, table)
    expected, expected_gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, table)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, 3 * wanted, rtol=0, atol=2e-6 * 3 * np.abs(wanted).max())


# ---- teachers: rows of propositions, judged by their marks ----------------------------------------------------------

PREFIX, TRUE, FALSE = 5, 7, 9  # a proposition ends in 5 7 or 5 9
TEACHER_WEIGHT = 0.25


def mixed_batch(rows=8, teachers=(1, 3, 4, 7), config=TINY):
    """Rows `teachers` hold five propositions each, and one decisive place of weight 0 that nobody may count."""
    batch, rng = random_batch(config, rows=rows), np.random.default_rng(1)
    batch["marks"] = np.zeros((rows, 2), np.int32)
    batch["decisive"] = np.zeros((rows, config.max_length), np.float32)
    for row in teachers:
        batch["marks"][row] = TRUE, FALSE
        batch["weights"][row] = 0
        for end in (3, 6, 9, 12, 15):
            batch["targets"][row, end - 1 : end + 1] = PREFIX, rng.choice((TRUE, FALSE))
            batch["weights"][row, end - 1 : end + 1] = TEACHER_WEIGHT
            batch["decisive"][row, end] = 1
        batch["targets"][row, 0], batch["decisive"][row, 0] = TRUE, 1
    return batch


def plain_nll(params, batch, config=TINY):
    """(B, L) by the formula, from whole logits."""
    log_probs = jax.nn.log_softmax(forward(params, config, batch["tokens"]))
    return -jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]


def place(batch, mesh):
    """What a loader gives, placed; token i stands for i bytes."""
    return global_batch(
        {k: v for k, v in batch.items() if k != "bytes"}, np.arange(61, dtype=np.float32), batch_sharding(mesh)
    )


def test_sums_of_teachers_are_those_by_hand():
    """One number a place, so logits are x times (0, 1, 3): id 2 beats id 1 where x > 0."""
    table = jnp.array([[0.0], [1.0], [3.0]])
    x = jnp.array([[2.0, -1.0, 0.5, 0.0], [2.0, -1.0, 0.5, -2.0], [1.0, 1.0, 1.0, 1.0]])[..., None]
    batch = {
        "marks": jnp.array([[2, 1], [1, 2], [0, 0]]),  # the last row is language
        "targets": jnp.array([[2, 2, 1, 2], [1, 1, 2, 1], [1, 2, 0, 1]]),
        "decisive": jnp.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]),
        "weights": jnp.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]),
    }
    found = teacher_sums(x, table, jnp.array([10.0, 20.0, 40.0]), batch)
    # Row 0: right, wrong, wrong, and equal logits are wrong. Row 1: not decisive, right, right, no weight.
    assert {name: float(value) for name, value in found.items()} == {
        "language_loss": 40,
        "language_weight": 4,
        "teacher_loss": 30,
        "teacher_weight": 3.5,
        "judged": 6,
        "correct": 3,
    }


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_a_judgement_is_the_larger_of_the_two_marks_logits(dtype, tied):
    config = with_fields(TINY, dtype=dtype, tied_embedding=tied)
    params, batch = random_params(config), mixed_batch()
    logits = np.asarray(jax.jit(forward, static_argnums=1)(params, config, batch["tokens"]))
    _, sums = jax.jit(loss_sums, static_argnums=2)(params, batch, config)
    right = judged = 0
    for row, place in zip(*np.nonzero(batch["decisive"] * batch["weights"]), strict=True):
        pair = logits[row, place, [TRUE, FALSE]]
        right += (TRUE, FALSE)[np.argmax(pair)] == batch["targets"][row, place]
        judged += 1
    assert judged == 20
    assert 0 < right < judged
    assert right != judged - right
    assert (int(sums["correct"]), int(sums["judged"])) == (right, judged)


def test_language_and_teacher_sums_are_their_rows_and_add_up_to_the_total():
    params, batch = random_params(TINY), mixed_batch()
    sums = jax.jit(loss_sums, static_argnums=2)(params, batch, TINY)[1]
    of_rows = np.asarray(plain_nll(params, batch) * batch["weights"]).sum(axis=1)
    teacher = np.isin(np.arange(8), (1, 3, 4, 7))
    np.testing.assert_allclose(sums["teacher_loss"], of_rows[teacher].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["language_loss"], of_rows[~teacher].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["language_loss"] + sums["teacher_loss"], sums["loss"], rtol=1e-6)
    assert sums["teacher_weight"] == 4 * 5 * 2 * TEACHER_WEIGHT
    assert sums["language_weight"] + sums["teacher_weight"] == sums["weight"] == batch["weights"].sum()


def test_gradient_of_the_mixed_loss_is_that_of_its_plain_formula():
    params, batch = random_params(TINY), mixed_batch()

    def plain(params):
        return jnp.sum(plain_nll(params, batch) * batch["weights"]) / batch["weights"].sum()

    _, found = jax.jit(functools.partial(gradients, config=TINY, placement=None))(params, batch, jax.random.key(0))
    expected = jax.jit(jax.grad(plain))(params)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=0, atol=2e-6 * largest)


def test_sums_with_teachers_are_those_of_the_whole_batch():  # cases B01, B02
    params, batch = random_params(TINY), mixed_batch()
    batch["weights"][1::4] = 0  # with four microbatches one has no weighted target at all
    run = jax.jit(functools.partial(gradients, config=TINY, placement=None), static_argnames="microbatches")
    whole = run(params, batch, jax.random.key(0), microbatches=1)[0]
    assert int(whole["judged"]) == 15  # of the four rows of teachers one has lost its weights
    for k in (2, 4):
        chex.assert_trees_all_close(run(params, batch, jax.random.key(0), microbatches=k)[0], whole, rtol=1e-6)


def test_metrics_with_teachers_are_equal_on_a_mesh_of_every_axis(spec, step):
    sharded = state_spec(TINY, OptimizerConfig(), make_mesh(MeshConfig(2, 2, 2), jax.devices()))
    batch, found = mixed_batch(), []
    for of_mesh, update in ((spec, step), (sharded, jit_train_step(sharded, 1))):
        state, placed = init_state(of_mesh, 0), place(batch, of_mesh.mesh)
        sums = jit_loss_sums(of_mesh.config, of_mesh.mesh)(state.params, placed)
        _, metrics = update(state, placed, np.float32(1e-3))
        found.append(jax.tree.map(np.asarray, (sums, metrics)))
    chex.assert_trees_all_close(found[1], found[0], rtol=2e-6)
    sums, metrics = found[0]
    assert sums["judged"] == 20
    expected = teacher_means(sums)
    assert set(expected) < set(metrics)
    chex.assert_trees_all_close({name: metrics[name] for name in expected}, expected, rtol=2e-6)
    np.testing.assert_allclose(metrics["loss"], sums["loss"] / sums["weight"], rtol=2e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_judging_gathers_no_table_and_multiplies_no_matrix(tied):
    config = with_fields(TINY, vocab_size=200, vocab_multiple=1, tied_embedding=tied)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices())
    spec, batch = state_spec(config, OptimizerConfig(), mesh), place(mixed_batch(), mesh)
    plain = {name: x for name, x in batch.items() if name not in ("marks", "decisive")}

    def program(batch):
        return jit_loss_sums(spec.config, spec.mesh).lower(spec.abstract.params, batch)

    judging, without = program(batch), program(plain)
    assert judging.as_text().count("dot_general") == without.as_text().count("dot_general") > 0
    shapes = re.findall(r"\w\[([\d,]+)\]", judging.compile().as_text())
    assert "100,32" in shapes  # half the vocabulary
    assert not any("200" in shape.split(",") for shape in shapes)


@pytest.mark.parametrize(("teachers", "missing"), [((), "teacher"), (range(4), "language")])
def test_a_batch_of_one_kind_has_no_mean_of_the_other(teachers, missing, spec, step, one_device_mesh, tmp_path):
    batch = mixed_batch(rows=4, teachers=teachers)
    _, metrics = step(init_state(spec, 0), place(batch, one_device_mesh), np.float32(0))
    present = {"teacher": "language", "language": "teacher"}[missing]
    none = {"teacher": {"judgement_accuracy"}, "language": {"bits_per_byte"}}[missing] | {f"{missing}_loss"}
    names = ("loss", "bits_per_byte", "language_loss", "teacher_loss", "judgement_accuracy", "gradient_norm")
    assert {name for name in names if not np.isfinite(metrics[name])} == none
    np.testing.assert_allclose(metrics[f"{present}_loss"], metrics["loss"], rtol=1e-6)
    assert int(metrics["skipped_updates"]) == 0
    lines = log_train(tmp_path, spec, metrics)
    assert {name for name in names if lines[0][name] is None} == none


def test_a_batch_without_any_target_changes_nothing_but_by_decay(spec, step, one_device_mesh):
    batch = mixed_batch(rows=4, teachers=(1,))
    batch["weights"][:] = 0
    state, metrics = step(init_state(spec, 0), place(batch, one_device_mesh), np.float32(0))
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0.0
    assert int(metrics["skipped_updates"]) == 0
    chex.assert_trees_all_equal(state.params, init_state(spec, 0).params)


def test_judged_targets_are_counted_once_although_every_process_has_all_rows(monkeypatch):
    sums = {name: np.float64(8) for name in ("loss", "weight", "bytes", "judged", "correct")}
    sums |= {f"{kind}_{name}": np.float64(4) for kind in ("language", "teacher") for name in ("loss", "weight")}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert validation_means(sums)["judged"] == 4


def log_train(workdir, spec, metrics):
    """The lines that the loop writes of one step."""
    config = RunConfig(model=TINY, stages=(StageConfig(name="a", steps=10),), log_every=1)
    bar = SimpleNamespace(update=lambda *_: None)
    with MetricsWriter(workdir, 0) as writer:
        run = SimpleNamespace(config=config, writer=writer, bar=bar, peak=1.0, mesh=spec.mesh, newest={})
        run.write = functools.partial(loop.Run.write, run)
        clock = SimpleNamespace(tick=lambda: None, rate=lambda tokens: 1.0)
        loop.Run.log(run, 1, metrics, config.schedule[0], spec, clock)
    return read_metrics(workdir)


def test_bytes_are_those_of_language_alone(spec, step, one_device_mesh):
    batch = mixed_batch(rows=4, teachers=(1, 2))
    placed = place(batch, one_device_mesh)
    by_hand = (batch["targets"] * batch["weights"])[[0, 3]].sum(axis=1)
    np.testing.assert_allclose(placed["bytes"], [by_hand[0], 0, 0, by_hand[1]])
    _, metrics = step(init_state(spec, 0), placed, np.float32(0))
    total = float(metrics["language_loss"]) * batch["weights"][[0, 3]].sum() / math.log(2)
    np.testing.assert_allclose(float(metrics["bits_per_byte"]), total / by_hand.sum(), rtol=1e-5)


def evaluate_rows(spec, rows, batch_size, evaluate=None):
    """(means, line on the screen) of one evaluation on `rows`."""
    rows = {k: v for k, v in rows.items() if k != "bytes"}
    sums_of = evaluate or jit_loss_sums(spec.config, spec.mesh)
    values = validation_loss(random_params(TINY), rows, sums_of, batch_size, np.arange(61, dtype=np.float32), spec.mesh)
    return values, describe(values)


def test_validation_says_the_loss_of_language_and_how_often_a_judgement_is_right(spec, tmp_path):
    """Seven rows in parts of four: the row that fills up the last part is not judged again."""
    rows, teacher = mixed_batch(rows=7, teachers=(0, 2, 5)), [0, 2, 5]
    line, text = evaluate_rows(spec, rows, 4)
    nll, weights = np.asarray(plain_nll(random_params(TINY), rows)), rows["weights"]
    of_text = np.delete(nll * weights, teacher, axis=0).sum()
    of_teachers = (nll * weights)[teacher].sum() / weights[teacher].sum()
    text_bytes = np.delete(rows["targets"] * weights, teacher, axis=0).sum()
    correct = jax.jit(loss_sums, static_argnums=2)(random_params(TINY), rows, TINY)[1]["correct"]
    assert line["judged"] == 15
    assert line["judgement_accuracy"] == int(correct) / 15
    np.testing.assert_allclose(line["loss"], of_text / np.delete(weights, teacher, axis=0).sum(), rtol=1e-5)
    np.testing.assert_allclose(line["bits_per_byte"], of_text / math.log(2) / text_bytes, rtol=1e-5)
    np.testing.assert_allclose(line["teacher_loss"], of_teachers, rtol=1e-5)
    assert f"judgement accuracy {100 * int(correct) / 15:.1f} % of 15" in text


def test_validation_text_of_known_sums(spec, tmp_path):
    sums = {"loss": 30.0, "weight": 12.0, "bytes": 4.0, "language_loss": 23.1, "language_weight": 10.0}
    sums |= {"teacher_loss": 6.9, "teacher_weight": 2.0, "judged": 512, "correct": 374}
    _, text = evaluate_rows(spec, random_batch(TINY), 4, evaluate=lambda params, batch: sums)
    assert text == ("validation loss 2.3100 nats a token, 8.3316 bits a byte, judgement accuracy 73.0 % of 512")


@pytest.mark.parametrize(("teachers", "missing"), [((), "teacher"), (range(4), "language")])
def test_validation_without_one_kind_has_null_for_it(teachers, missing, spec, tmp_path):
    line, _ = evaluate_rows(spec, mixed_batch(rows=4, teachers=teachers), 4)
    none = {"teacher": {"teacher_loss", "judgement_accuracy"}, "language": {"loss", "bits_per_byte"}}[missing]
    assert {name for name, value in line.items() if np.isnan(value)} == none


def test_without_teachers_lines_say_what_they_always_said(spec, step, one_device_mesh, tmp_path):
    batch = random_batch(TINY)
    line, text = evaluate_rows(spec, batch, 4)
    assert list(line) == ["loss", "bits_per_byte"]
    assert text == f"validation loss {line['loss']:.4f} nats a token, {line['bits_per_byte']:.4f} bits a byte"
    _, metrics = step(init_state(spec, 0), place(batch, one_device_mesh), np.float32(0))
    (line,) = log_train(tmp_path / "train", spec, metrics)
    assert list(line)[3:7] == ["loss", "bits_per_byte", "gradient_norm", "learning_rate"]
