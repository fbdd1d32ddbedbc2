"""One update: accumulation, clipping, decay, skipping, masks, dropout."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, random_batch, random_params, with_fields
from step_cases import adam, mixed_batch, on_mesh

from flmjax.config import GrowthConfig, OptimizerConfig, RunConfig, StageConfig, resize
from flmjax.data.batch import global_batch
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import Ramp, masked
from flmjax.model.loss import loss_sums
from flmjax.model.microbatches import in_parts
from flmjax.model.mup import scaling_of
from flmjax.model.transformer import abstract_params, init_params
from flmjax.optimizer.adam import AdamState, make_optimizer
from flmjax.sharding.axes import map_with_axes
from flmjax.sharding.rules import batch_sharding
from flmjax.training import loop
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import accumulate, gradients, jit_train_step, nonfinite_leaves


def test_accumulated_loss_is_the_mean_over_tokens():
    """Not the mean of the microbatches' means, in which short microbatches weigh too much: levanter#842."""
    # Microbatch rows 0, 2 and 1, 3: 3 loss tokens at 2.0, 13 at 1.0; means of means would give 1.5
    values = np.where(np.arange(4) % 2 == 0, 2.0, 1.0)[:, None] * np.ones((4, 8), np.float32)
    weights = np.zeros((4, 8), np.float32)
    weights[0, :3], weights[1, :8], weights[3, :5] = 1, 1, 1

    def value_and_grad(params, batch, key):
        sums = {"loss": jnp.sum(batch["values"] * batch["weights"]), "weight": jnp.sum(batch["weights"])}
        return sums, params

    sums, _ = accumulate(value_and_grad, 2)(jnp.zeros(()), {"values": values, "weights": weights}, jax.random.key(0))
    assert sums["loss"] / sums["weight"] == 1.1875


def test_accumulated_gradient_is_that_of_the_undivided_batch():
    """Also with a microbatch without any weighted target, which must not divide 0 by 0: ml-explore/mlx-lm#1413."""
    params, batch = random_params(TINY), random_batch(TINY, rows=8)
    batch["weights"][1::4] = 0  # with four microbatches one has no weighted target
    assert len(set(batch["weights"].reshape(2, 4, -1).sum(axis=(0, 2)))) == 4
    run = jax.jit(functools.partial(gradients, config=TINY, placement=None), static_argnames="microbatches")
    key = jax.random.key(0)
    undivided = run(params, batch, key, microbatches=1)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(undivided[1]))
    for k in (2, 4):
        parts = run(params, batch, key, microbatches=k)
        chex.assert_tree_all_finite(parts)
        chex.assert_trees_all_close(parts[1], undivided[1], rtol=0, atol=1e-6 * largest)
        chex.assert_trees_all_close(parts[0], undivided[0], rtol=1e-6)


def test_small_updates_add_up_under_bfloat16_compute(one_device_mesh):
    """Weights stored in bfloat16 would round every small update away: google-research/big_vision#41."""
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


def test_decay_touches_matrices_alone(tiny_spec, tiny_step):
    """Biases, gains and shifts do not decay: optax#25."""
    state = init_state(tiny_spec, 0)
    before = jax.tree.map(lambda x: np.asarray(x) + 0.5, state.params)
    state = state.replace(params=jax.tree.map(jnp.asarray, before))
    batch = {**random_batch(TINY), "weights": np.zeros((4, 16), np.float32)}
    after = tiny_step(state, batch, np.float32(0.1))[0].params

    def check(path, axes, a, b):
        expected = a * (1 - 0.1 * 0.1) if path.split("/")[-1] in ("kernel", "embedding", "head") else a
        if path == "embedding":  # padding does not decay
            expected[TINY.vocab_size :] = a[TINY.vocab_size :]
        np.testing.assert_allclose(b, expected, rtol=1e-6, err_msg=path)
        if path.split("/")[-1] in ("bias", "scale"):
            np.testing.assert_array_equal(a, b, err_msg=path)

    map_with_axes(check, tiny_spec.axes, before, after)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_nonfinite_gradient_keeps_the_state_and_is_named(tiny_spec, tiny_step, value):
    """Clipping by the norm would turn one infinity into NaN in every leaf: pytorch/pytorch#46849, optax#1746."""
    state = init_state(tiny_spec, 0)
    for i in range(4):
        state, metrics = tiny_step(state, random_batch(TINY, seed=i), np.float32(1e-3))
    assert int(metrics["skipped_updates"]) == 0
    before = jax.tree.map(np.asarray, state)
    bad = random_batch(TINY, seed=5)
    bad["weights"][0, 0] = value
    state, metrics = tiny_step(state, bad, np.float32(1e-3))
    chex.assert_trees_all_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert int(state.step) == 5
    assert int(metrics["skipped_updates"]) == int(state.skipped_updates) == 1
    assert "final_norm/scale" in nonfinite_leaves(np.asarray(metrics["finite"]), state.params)
    state, metrics = tiny_step(state, random_batch(TINY, seed=6), np.float32(1e-3))
    assert int(state.skipped_updates) == 0
    assert int(adam(state).count) == 5  # of 6 updates one was skipped


def test_one_spoilt_leaf_is_named_alone(tiny_spec):
    finite = np.ones(len(jax.tree.leaves(tiny_spec.abstract.params)), bool)
    paths = nonfinite_leaves(~finite, tiny_spec.abstract.params)
    finite[paths.index("layers/mlp/up/kernel")] = False
    assert nonfinite_leaves(finite, tiny_spec.abstract.params) == ["layers/mlp/up/kernel"]


def test_clipping_bounds_the_norm(tiny_spec):
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 3.0), tiny_spec.abstract.params)
    clip = make_optimizer(OptimizerConfig(weight_decay=0.0, clip_norm=0.5), TINY, tiny_spec.axes)
    _, state = jax.jit(lambda g: clip.update(g, clip.init(g), g))(grads)
    moments = next(s for s in state if isinstance(s, AdamState)).adam.mu
    assert abs(float(optax.tree.norm(moments)) / 0.1 - 0.5) < 1e-5


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


@pytest.mark.parametrize(
    ("sizes", "grown"), [({"mlp_dim": 256}, "mlp/down"), ({"num_heads": 8}, "attention/output"), ({}, None)]
)
def test_mup_scales_an_axis_that_grows_alone(sizes, grown):
    """A matrix whose fan-in doubles gets half the rate and 1 / sqrt(2) of the deviation; the others keep theirs."""
    old = with_fields(TINY, base_embed_dim=8, mlp_dim=128, num_heads=4)
    new = resize(old, **sizes)

    def check(path, leaf):
        before, after = scaling_of(old, leaf), scaling_of(new, leaf)
        factor = 2 if grown is not None and path == f"layers/{grown}/kernel" else 1
        assert after.rate_divisor == pytest.approx(factor * before.rate_divisor), path
        assert after.init_std == pytest.approx(before.init_std / math.sqrt(factor)), path

    map_with_axes(check, abstract_params(old)[1])
    wider = resize(new, embed_dim=2 * new.embed_dim, mlp_dim=2 * new.mlp_dim, num_heads=2 * new.num_heads)
    assert wider.mlp_multiplier == 2 * new.mlp_multiplier
    assert wider.heads_multiplier == 2 * new.heads_multiplier


@pytest.mark.parametrize("optimizer", [{"weight_decay": 3e38}, {"eps": 1e-45, "b2": 0.0}])
def test_a_parameter_is_never_made_nonfinite(optimizer, one_device_mesh):
    """Finite gradients and a huge setting: the update was accepted, and every parameter was infinite."""
    spec = state_spec(TINY, OptimizerConfig(**optimizer), one_device_mesh)
    state = init_state(spec, 0)
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = jit_train_step(spec, 1)(state, random_batch(TINY), np.float32(1e38))
    assert int(metrics["skipped_updates"]) == 1
    chex.assert_trees_all_equal(after.params, before)
    assert nonfinite_leaves(np.asarray(metrics["finite"]), before)


def test_padding_of_the_vocabulary_does_not_move(one_device_mesh):
    """Weight decay shrank rows that no gradient reaches."""
    config = with_fields(TINY, tied_embedding=False)
    spec = state_spec(config, OptimizerConfig(weight_decay=0.5), one_device_mesh)
    state = init_state(spec, 0)
    before = jax.tree.map(np.asarray, state.params)
    after, _ = jit_train_step(spec, 1)(state, random_batch(config), np.float32(1e-2))
    real = config.vocab_size
    np.testing.assert_array_equal(after.params["embedding"][real:], before["embedding"][real:])
    np.testing.assert_array_equal(after.params["head"][:, real:], before["head"][:, real:])
    assert (np.asarray(after.params["head"])[:, :real] != before["head"][:, :real]).all()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_masked_step_is_a_step_of_the_masked_model(microbatches, one_device_mesh):
    """The step's loss, gradient norm and first moments equal those through masked() with the openness of that step."""
    new = resize(TINY, "mask", embed_dim=40, num_layers=3)
    config = OptimizerConfig(clip_norm=None)
    spec = state_spec(new, config, one_device_mesh)
    ramp = Ramp(Growth(TINY, new, GrowthConfig("mask", ramp_steps=10)), start=2)
    state = dataclasses.replace(init_state(spec, 0), step=jnp.int32(5))
    params, batch = jax.tree.map(np.asarray, state.params), random_batch(new)

    def mean_loss(p):
        return loss_sums(masked(p, ramp.growth, 0.3), batch, new)[0] / batch["weights"].sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    after, metrics = jit_train_step(spec, microbatches, ramp=ramp)(state, batch, np.float32(1e-3))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    moments = adam(after).mu
    chex.assert_trees_all_close(moments, jax.tree.map(lambda g: 0.1 * g, gradient), rtol=1e-4, atol=1e-8)


def test_a_part_has_every_third_sequence_and_results_keep_their_order():
    """Neighbouring sequences are on one device: parts of neighbours would move them between devices."""

    def function(part, number):
        return jnp.sum(part["x"]) * (number + 1), part["x"] + 100 * number

    sums, sequences = jax.jit(lambda batch: in_parts(function, batch, 3))({"x": jnp.arange(6)})
    assert sequences.tolist() == [0, 101, 202, 3, 104, 205]
    assert sums == 1 * 3 + 2 * 5 + 3 * 7


def test_a_stage_leaves_its_mask_behind(one_device_mesh, monkeypatch):
    """From the end of the ramp on, the program of the step is letter for letter that of a plain step."""
    mask = GrowthConfig("mask", ramp_steps=2)
    stages = (StageConfig(name="a", steps=3), StageConfig(name="b", steps=4, growth=mask, embed_dim=40))
    config = RunConfig(model=TINY, stages=stages)
    model = config.stage_models[1]
    spec = state_spec(model, OptimizerConfig(), one_device_mesh)
    texts, jit_stage_step = [], loop.jit_stage_step

    def lowered(*args):
        step = jit_stage_step(*args)

        def spy(state, batch, rate):
            texts.append(step.lower(state, batch, rate).as_text())
            return step(state, batch, rate)

        return spy

    monkeypatch.setattr(loop, "jit_stage_step", lowered)
    sharding = batch_sharding(one_device_mesh)
    batches = (global_batch(random_batch(model, seed=i), sharding) for i in range(9))
    for at, masked_steps in ((3, 2), (4, 1), (5, 0)):
        texts.clear()
        state = dataclasses.replace(init_state(spec, 0), step=jnp.int32(at))
        updates = loop.run_stage(state, spec, config.schedule[1], lambda step: 1e-3, batches)
        assert [step for step, _, _ in updates] == list(range(at + 1, 8))
        plain = jit_train_step(spec, 1).lower(*plain_arguments(spec, model)).as_text()
        assert [text == plain for text in texts] == [False] * masked_steps + [True] * (7 - at - masked_steps)


def plain_arguments(spec, model):
    return init_state(spec, 0), global_batch(random_batch(model), batch_sharding(spec.mesh)), np.float32(0)


def test_dropout_resumes_as_if_never_stopped(one_device_mesh):
    """Dropout's random state must come back with the checkpoint: maxtext#276."""
    spec = state_spec(with_fields(TINY, dropout=0.1), OptimizerConfig(), one_device_mesh)
    run = jit_train_step(spec, 1)
    batch = random_batch(TINY)
    state, losses = init_state(spec, 0), []
    for i in range(6):
        if i == 3:
            middle = jax.tree.map(np.asarray, state)
        state, metrics = run(state, batch, np.float32(0.0))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 6  # every step has another mask, though the rate is 0
    resumed, again = jax.tree.map(jnp.asarray, middle), []
    for _ in range(3):
        resumed, metrics = run(resumed, batch, np.float32(0.0))
        again.append(float(metrics["loss"]))
    assert again == losses[3:]


def test_bits_per_byte_are_counted_from_the_batch_s_bytes(tiny_spec, tiny_step, one_device_mesh):
    batch = random_batch(TINY)
    batch["bytes"] = np.array([3, 5, 700, 11], np.float32)
    _, metrics = tiny_step(init_state(tiny_spec, 0), on_mesh(batch, one_device_mesh), np.float32(0.0))
    total = float(metrics["loss"]) * batch["weights"].sum() / math.log(2)
    np.testing.assert_allclose(float(metrics["bits_per_byte"]), total / 719, rtol=1e-5)


def test_a_batch_without_any_target_changes_no_parameter(tiny_spec, tiny_step, one_device_mesh):
    batch = mixed_batch(rows=4, teachers=(1,))
    batch["weights"][:] = 0
    state, metrics = tiny_step(init_state(tiny_spec, 0), on_mesh(batch, one_device_mesh), np.float32(0))
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0.0
    assert int(metrics["skipped_updates"]) == 0
    chex.assert_trees_all_equal(state.params, init_state(tiny_spec, 0).params)


def products(jaxpr) -> int:
    """Matrix products that a jaxpr executes, those in a loop once for each iteration."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        inner = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        total += equation.primitive.name == "dot_general"
        total += equation.params.get("length", 1) * sum(map(products, inner))
    return total


def test_remat_dots_repeats_attention_alone():
    """A product hidden in a custom_vjp is not kept: "dots" would recompute as much as "full"."""
    layers, counts = 3, {}
    for remat in ("none", "dots", "full"):
        config = with_fields(TINY, num_layers=layers, remat=remat)
        params = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        loss = lambda p, config=config: loss_sums(p, random_batch(TINY), config)[0]
        counts[remat] = products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert counts["dots"] == counts["none"] + 2 * layers  # scores and mix
    assert counts["full"] == counts["dots"] + 5 * layers  # query, key, value, output, up; not down
