"""Batches with teachers: rows of propositions, judged by their marks."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params, with_fields
from step_cases import FALSE, TEACHER_WEIGHT, TRUE, log_train, mixed_batch, on_mesh, plain_nll

from flmjax.config import MeshShape, OptimizerConfig
from flmjax.evaluation.validation_loss import jit_source_sums, validation_means
from flmjax.model.loss import loss_sums, teacher_sums
from flmjax.model.transformer import forward
from flmjax.sharding.mesh import make_mesh
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import gradients, jit_train_step


def test_sums_of_teachers_are_those_by_hand():
    """States of one dimension: logits are x times (0, 1, 3), so id 2 beats id 1 where x > 0."""
    table = jnp.array([[0.0], [1.0], [3.0]])
    x = jnp.array([[2.0, -1.0, 0.5, 0.0], [2.0, -1.0, 0.5, -2.0], [1.0, 1.0, 1.0, 1.0]])[..., None]
    batch = {
        "marks": jnp.array([[2, 1], [1, 2], [0, 0]]),  # the last row is language
        "targets": jnp.array([[2, 2, 1, 2], [1, 1, 2, 1], [1, 2, 0, 1]]),
        "decisive": jnp.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]),
        "weights": jnp.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]),
    }
    sums = teacher_sums(x, table, jnp.array([10.0, 20.0, 40.0]), batch)
    # Row 0: right, wrong, wrong, and equal logits are wrong. Row 1: not decisive, right, right, no weight.
    assert {name: float(value) for name, value in sums.items()} == {
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
    params, batch = random_params(config, seed=1), mixed_batch()
    logits = np.asarray(jax.jit(forward, static_argnums=1)(params, config, batch["tokens"]))
    _, sums = jax.jit(loss_sums, static_argnums=2)(params, batch, config)
    right = judged = 0
    for row, position in zip(*np.nonzero(batch["decisive"] * batch["weights"]), strict=True):
        pair = logits[row, position, [TRUE, FALSE]]
        right += (TRUE, FALSE)[np.argmax(pair)] == batch["targets"][row, position]
        judged += 1
    assert judged == 20
    assert 0 < right < judged
    assert right != judged - right
    assert (int(sums["correct"]), int(sums["judged"])) == (right, judged)


def test_language_and_teacher_sums_add_up_to_the_total():
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

    _, gradient = jax.jit(functools.partial(gradients, config=TINY, placement=None))(params, batch, jax.random.key(0))
    expected = jax.jit(jax.grad(plain))(params)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    chex.assert_trees_all_close(gradient, expected, rtol=0, atol=2e-6 * largest)


def test_sums_with_teachers_are_those_of_the_undivided_batch():
    """Also with a microbatch without any weighted target: ml-explore/mlx-lm#1413."""
    params, batch = random_params(TINY), mixed_batch()
    batch["weights"][1::4] = 0  # with four microbatches one has no weighted target
    run = jax.jit(functools.partial(gradients, config=TINY, placement=None), static_argnames="microbatches")
    undivided = run(params, batch, jax.random.key(0), microbatches=1)[0]
    assert int(undivided["judged"]) == 15  # of the four rows of teachers one has lost its weights
    for k in (2, 4):
        chex.assert_trees_all_close(run(params, batch, jax.random.key(0), microbatches=k)[0], undivided, rtol=1e-6)


def test_metrics_with_teachers_are_equal_on_a_mesh_of_every_axis(tiny_spec, tiny_step):
    sharded = state_spec(TINY, OptimizerConfig(), make_mesh(MeshShape(2, 2, 2), jax.devices()))
    batch, results = mixed_batch(), []
    for of_mesh, update in ((tiny_spec, tiny_step), (sharded, jit_train_step(sharded, 1))):
        state, placed = init_state(of_mesh, 0), on_mesh(batch, of_mesh.mesh)
        sums = jit_source_sums(TINY, of_mesh.mesh, 2)(state.params, placed, (batch["decisive"] > 0).any(1).astype(int))
        _, metrics = update(state, placed, np.float32(1e-3))
        results.append(jax.tree.map(np.asarray, (sums, metrics)))
    chex.assert_trees_all_close(results[1], results[0], rtol=2e-6)
    sums, metrics = results[0]
    assert sums["judged"].tolist() == [0, 20]
    means = validation_means(sums, ("text", "teacher"), np.array([False, True]))
    np.testing.assert_allclose(metrics["language_loss"], means["loss"], rtol=2e-6)
    for name in ("bits_per_byte", "teacher_loss", "judgement_accuracy"):
        np.testing.assert_allclose(metrics[name], means[name], rtol=2e-6)
    np.testing.assert_allclose(metrics["loss"], sums["loss"].sum() / sums["weight"].sum(), rtol=2e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_judging_gathers_no_table_and_multiplies_no_matrix(tied):
    config = with_fields(TINY, vocab_size=200, vocab_multiple=1, tied_embedding=tied)
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices())
    spec, batch = state_spec(config, OptimizerConfig(), mesh), on_mesh(mixed_batch(), mesh)
    plain = {name: x for name, x in batch.items() if name not in ("marks", "decisive")}

    def program(batch):
        return jit_source_sums(config, mesh, 2).lower(spec.abstract.params, batch, np.zeros(8, np.int32))

    judging, without = program(batch), program(plain)
    assert judging.as_text().count("dot_general") == without.as_text().count("dot_general") > 0
    shapes = re.findall(r"\w\[([\d,]+)\]", judging.compile().as_text())
    assert "100,32" in shapes  # half the vocabulary
    assert not any("200" in shape.split(",") for shape in shapes)


@pytest.mark.parametrize(("teachers", "missing"), [((), "teacher"), (range(4), "language")])
def test_a_batch_of_one_kind_has_no_mean_of_the_other(
    teachers, missing, tiny_spec, tiny_step, one_device_mesh, tmp_path
):
    batch = mixed_batch(rows=4, teachers=teachers)
    _, metrics = tiny_step(init_state(tiny_spec, 0), on_mesh(batch, one_device_mesh), np.float32(0))
    present = {"teacher": "language", "language": "teacher"}[missing]
    none = {"teacher": {"judgement_accuracy"}, "language": {"bits_per_byte"}}[missing] | {f"{missing}_loss"}
    names = ("loss", "bits_per_byte", "language_loss", "teacher_loss", "judgement_accuracy", "gradient_norm")
    assert {name for name in names if not np.isfinite(metrics[name])} == none
    np.testing.assert_allclose(metrics[f"{present}_loss"], metrics["loss"], rtol=1e-6)
    assert int(metrics["skipped_updates"]) == 0
    lines = log_train(tmp_path, tiny_spec, metrics)
    assert {name for name in names if lines[0][name] is None} == none
