"""Loss on held-out sequences, in total, by source and by teacher, as numbers and as a line on the screen."""

import math

import jax
import numpy as np
import pytest
from conftest import TINY, random_batch, random_params
from step_cases import log_train, mixed_batch, on_mesh, plain_nll

from flmjax.config import MeshShape, OptimizerConfig
from flmjax.data.loader import ValidationSet
from flmjax.evaluation.validation_loss import describe, jit_source_sums, validation_loss, validation_means
from flmjax.model.loss import loss_sums
from flmjax.sharding.mesh import make_mesh
from flmjax.training.state import init_state, state_spec

LABELS, IS_TEACHER = ("en", "zh", "isa", "cola"), np.array([False, False, True, True])


def evaluate_rows(spec, rows, batch_size, sources=None, is_teacher=IS_TEACHER):
    """(means of validation_loss, its line on the screen) for `rows`; by default of sources "en" and "isa"."""
    if sources is None:
        sources = np.array([2 if marks.any() else 0 for marks in rows["marks"]], np.int32)
    sums_of = jit_source_sums(spec.config, spec.mesh, len(is_teacher))
    validation = ValidationSet(rows, sources, LABELS[: len(is_teacher)], is_teacher)
    values = validation_loss(random_params(TINY), validation, sums_of, batch_size, spec.mesh)
    assert sums_of._cache_size() == 1  # one compiled program for all batches
    return values, describe(values)


def nll_sums(rows):
    """Nats and weights of each sequence by the plain formula."""
    nll = np.asarray(plain_nll(random_params(TINY), rows)) * rows["weights"]
    return nll.sum(axis=1), rows["weights"].sum(axis=1)


def test_validation_has_the_language_loss_and_the_judgements(tiny_spec):
    """Seven rows in batches of four: the row that fills up the last batch is not judged twice."""
    rows, teacher = mixed_batch(rows=7, teachers=(0, 2, 5)), [0, 2, 5]
    line, text = evaluate_rows(tiny_spec, rows, 4)
    nll, weights = nll_sums(rows)
    of_text = np.delete(nll, teacher).sum()
    correct = jax.jit(loss_sums, static_argnums=2)(random_params(TINY), rows, TINY)[1]["correct"]
    assert line["judged"] == 15
    assert line["judgement_accuracy"] == int(correct) / 15
    np.testing.assert_allclose(line["loss"], of_text / np.delete(weights, teacher).sum(), rtol=1e-5)
    np.testing.assert_allclose(line["bits_per_byte"], of_text / math.log(2) / rows["bytes"].sum(), rtol=1e-5)
    np.testing.assert_allclose(line["teacher_loss"], nll[teacher].sum() / weights[teacher].sum(), rtol=1e-5)
    assert f"judgement accuracy {100 * int(correct) / 15:.1f} % of 15" in text


def test_each_source_and_each_teacher_has_its_own_means(tiny_spec):
    """NVIDIA-NeMo/Megatron-Bridge#618: the loss of two sources was one number. Eleven rows in batches of four."""
    rows = mixed_batch(rows=11, teachers=(1, 3, 4, 7))
    rows["bytes"] = np.where(rows["marks"].any(axis=1), 0, np.arange(20, 31)).astype(np.float32)
    sources = np.array([0, 2, 1, 3, 2, 0, 1, 3, 0, 0, 1], np.int32)
    line, text = evaluate_rows(tiny_spec, rows, 4, sources)
    nll, weights = nll_sums(rows)
    for source, label in enumerate(LABELS[:2]):
        of_source = sources == source
        nats = nll[of_source].sum()
        np.testing.assert_allclose(line[f"loss/{label}"], nats / weights[of_source].sum(), rtol=1e-5)
        bits = nats / math.log(2) / rows["bytes"][of_source].sum()
        np.testing.assert_allclose(line[f"bits_per_byte/{label}"], bits, rtol=1e-5)
        assert f"{label} {bits:.4f}" in text
    correct = 0
    for source, label in ((2, "isa"), (3, "cola")):
        of_teacher = {name: x[sources == source] for name, x in rows.items()}
        judged = jax.jit(loss_sums, static_argnums=2)(random_params(TINY), of_teacher, TINY)[1]
        assert int(judged["judged"]) == 10
        assert line[f"judgement_accuracy/{label}"] == int(judged["correct"]) / 10
        correct += int(judged["correct"])
    assert line["judgement_accuracy"] == correct / 20
    np.testing.assert_allclose(line["loss"], nll[sources < 2].sum() / weights[sources < 2].sum(), rtol=1e-5)


def test_means_by_source_are_equal_on_a_mesh_of_every_axis(tiny_spec):
    rows, sources = mixed_batch(), np.array([0, 2, 1, 3, 2, 0, 1, 3], np.int32)
    sharded = state_spec(TINY, OptimizerConfig(), make_mesh(MeshShape(2, 2, 2), jax.devices()))
    line, other = (evaluate_rows(spec, rows, size, sources)[0] for spec, size in ((tiny_spec, 8), (sharded, 4)))
    assert line == pytest.approx(other, rel=1e-5)


def sums_of_sources(**sums):
    return {name: np.array(values, np.float64) for name, values in sums.items()}


KNOWN = sums_of_sources(
    loss=[14.0, 9.1, 6.9, 3.0], weight=[6, 4, 2, 2], bytes=[1, 3, 0, 0], judged=[0, 0, 500, 12], correct=[0, 0, 368, 6]
)


def test_validation_text_of_known_sums():
    text = describe(validation_means(KNOWN, LABELS, IS_TEACHER))
    assert text == (
        "validation loss 2.3100 nats a token, 8.3316 bits a byte (en 20.1977, zh 4.3762), judgement accuracy 73.0 % of "
        "512 (isa 73.6 %, cola 50.0 %)"
    )


def test_one_source_of_a_kind_is_not_printed_twice():
    one = {name: x[[0, 2]] for name, x in KNOWN.items()}
    means = validation_means(one, ("en", "isa"), np.array([False, True]))
    assert list(means) == ["loss", "bits_per_byte", "teacher_loss", "judgement_accuracy", "judged"]
    assert "(" not in describe(means)


def test_a_source_without_a_sequence_has_no_mean():
    empty = {name: x * np.array([1, 0, 1, 0]) for name, x in KNOWN.items()}
    absent = validation_means(KNOWN, LABELS, IS_TEACHER).keys() - validation_means(empty, LABELS, IS_TEACHER).keys()
    assert absent == {"loss/zh", "bits_per_byte/zh", "judgement_accuracy/cola"}


@pytest.mark.parametrize(("teachers", "missing"), [((), "teacher"), (range(4), "language")])
def test_validation_without_one_kind_has_nan_for_it(teachers, missing, tiny_spec):
    line, _ = evaluate_rows(tiny_spec, mixed_batch(rows=4, teachers=teachers), 4, None, np.array([False, False, True]))
    none = {"teacher": {"teacher_loss", "judgement_accuracy"}, "language": {"loss", "bits_per_byte"}}[missing]
    assert none <= {name for name, value in line.items() if np.isnan(value)}


def test_lines_without_teachers_have_the_usual_metrics(tiny_spec, tiny_step, one_device_mesh, tmp_path):
    batch = random_batch(TINY)
    line, text = evaluate_rows(tiny_spec, batch, 4, np.zeros(4, np.int32), np.array([False]))
    assert list(line) == ["loss", "bits_per_byte"]
    assert text == f"validation loss {line['loss']:.4f} nats a token, {line['bits_per_byte']:.4f} bits a byte"
    _, metrics = tiny_step(init_state(tiny_spec, 0), on_mesh(batch, one_device_mesh), np.float32(0))
    (line,) = log_train(tmp_path, tiny_spec, metrics)
    assert list(line)[3:7] == ["loss", "bits_per_byte", "gradient_norm", "learning_rate"]
