"""Loss on held-out rows, with and without teachers, as numbers and as a line on the screen."""

import math

import jax
import numpy as np
import pytest
from conftest import TINY, random_batch, random_params
from step_cases import log_train, mixed_batch, on_mesh, plain_nll

from flmjax.evaluation.validation_loss import describe, jit_loss_sums, validation_loss, validation_means
from flmjax.model.loss import loss_sums
from flmjax.training.state import init_state


def test_judged_targets_of_two_processes_are_counted_once(monkeypatch):
    """Every process has all held-out rows, so their sum over processes counts each target once a process."""
    sums = {name: np.float64(8) for name in ("loss", "weight", "bytes", "judged", "correct")}
    sums |= {f"{kind}_{name}": np.float64(4) for kind in ("language", "teacher") for name in ("loss", "weight")}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert validation_means(sums)["judged"] == 4


def evaluate_rows(spec, rows, batch_size, evaluate=None):
    """(means of validation_loss, its line on the screen) for `rows`."""
    rows = {k: v for k, v in rows.items() if k != "bytes"}
    sums_of = evaluate or jit_loss_sums(spec.config, spec.mesh)
    values = validation_loss(random_params(TINY), rows, sums_of, batch_size, np.arange(61, dtype=np.float32), spec.mesh)
    return values, describe(values)


def test_validation_has_the_language_loss_and_the_judgements(tiny_spec):
    """Seven rows in batches of four: the row that fills up the last batch is not judged twice."""
    rows, teacher = mixed_batch(rows=7, teachers=(0, 2, 5)), [0, 2, 5]
    line, text = evaluate_rows(tiny_spec, rows, 4)
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


def test_validation_text_of_known_sums(tiny_spec):
    sums = {"loss": 30.0, "weight": 12.0, "bytes": 4.0, "language_loss": 23.1, "language_weight": 10.0}
    sums |= {"teacher_loss": 6.9, "teacher_weight": 2.0, "judged": 512, "correct": 374}
    _, text = evaluate_rows(tiny_spec, random_batch(TINY), 4, evaluate=lambda params, batch: sums)
    assert text == ("validation loss 2.3100 nats a token, 8.3316 bits a byte, judgement accuracy 73.0 % of 512")


@pytest.mark.parametrize(("teachers", "missing"), [((), "teacher"), (range(4), "language")])
def test_validation_without_one_kind_has_nan_for_it(teachers, missing, tiny_spec):
    line, _ = evaluate_rows(tiny_spec, mixed_batch(rows=4, teachers=teachers), 4)
    none = {"teacher": {"teacher_loss", "judgement_accuracy"}, "language": {"loss", "bits_per_byte"}}[missing]
    assert {name for name, value in line.items() if np.isnan(value)} == none


def test_lines_without_teachers_have_the_usual_metrics(tiny_spec, tiny_step, one_device_mesh, tmp_path):
    batch = random_batch(TINY)
    line, text = evaluate_rows(tiny_spec, batch, 4)
    assert list(line) == ["loss", "bits_per_byte"]
    assert text == f"validation loss {line['loss']:.4f} nats a token, {line['bits_per_byte']:.4f} bits a byte"
    _, metrics = tiny_step(init_state(tiny_spec, 0), on_mesh(batch, one_device_mesh), np.float32(0))
    (line,) = log_train(tmp_path, tiny_spec, metrics)
    assert list(line)[3:7] == ["loss", "bits_per_byte", "gradient_norm", "learning_rate"]
