"""Validation loss: the same number for every batch size, mesh and number of processes, in total and by source."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from flmjax.config import ModelConfig
from flmjax.data.batch import Batch, split_over_devices
from flmjax.data.loader import ValidationSet
from flmjax.model.loss import source_sums
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import Params
from flmjax.sharding.rules import Placement, batch_sharding, replicated, tree_shardings

SourceSums = Callable[[Params, dict[str, jax.Array], jax.Array], dict[str, jax.Array]]


def jit_source_sums(config: ModelConfig, mesh: jax.sharding.Mesh, num_sources: int) -> SourceSums:
    """The jitted function (parameters, batch, sources of the sequences) -> sums of model.loss.source_sums."""
    sums = functools.partial(source_sums, num_sources=num_sources, config=config, placement=Placement(mesh))
    sharding = batch_sharding(mesh)
    return jax.jit(
        lambda params, batch, source_B: sums(params, batch, source_B),
        in_shardings=(tree_shardings(mesh, abstract_params(config)[1]), sharding, sharding),
        out_shardings=replicated(mesh),
    )


def validation_loss(
    params: Params, validation: ValidationSet, sums_of: SourceSums, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Mean validation loss over all sequences of `validation`, computed in batches of `batch_size` sequences.

    Args:
        params: float32 parameters.
        sums_of: result of jit_source_sums for the model on `mesh`.

    Returns:
        The means of validation_means.
    """
    sums: dict[str, Any] = {}
    sharding = batch_sharding(mesh)
    for batch, source_B in padded_batches((validation.rows, validation.sources), batch_size):
        part = sums_of(params, *split_over_devices((batch, source_B), sharding))
        sums = {name: sums.get(name, 0.0) + np.asarray(value, np.float64) for name, value in part.items()}
    return validation_means(sums, validation.labels, validation.is_teacher)


def padded_batches(rows: tuple[Batch, np.ndarray], size: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches of `size` sequences in order; the last batch is filled up with sequences of weight 0.

    Args:
        rows: all sequences, and an array with an entry for each.
    """
    total = len(rows[1])
    for start in range(0, total, size):
        places = np.arange(start, start + size)
        batch, entries = jax.tree.map(lambda x, places=places % total: x[places], rows)
        is_row = (places < total).astype(np.float32)
        batch["weights"] = batch["weights"] * is_row[:, None]
        batch["bytes"] = batch["bytes"] * is_row
        yield batch, entries


def describe(values: dict[str, Any]) -> str:
    """One line of text with the values that validation_loss returns."""
    text = f"validation loss {values['loss']:.4f} nats a token, {values['bits_per_byte']:.4f} bits a byte"
    text += _by_source(values, "bits_per_byte", ".4f", 1)
    if "judged" in values:
        text += f", judgement accuracy {100 * values['judgement_accuracy']:.1f} % of {values['judged']}"
        text += _by_source(values, "judgement_accuracy", ".1f", 100, " %")
    return text


def _by_source(values: dict[str, Any], name: str, form: str, factor: int, unit: str = "") -> str:
    """The values of a metric by source in brackets; empty if there is one source of the kind."""
    of_sources = {key.split("/", 1)[1]: value for key, value in values.items() if key.startswith(f"{name}/")}
    listed = ", ".join(f"{label} {factor * value:{form}}{unit}" for label, value in of_sources.items())
    return f" ({listed})" if listed else ""


def validation_means(sums: dict[str, np.ndarray], labels: tuple[str, ...], is_teacher: np.ndarray) -> dict[str, Any]:
    """Means over all sequences, each computed from sums over all sequences, never from other means.

    Args:
        sums: sums of model.loss.source_sums for each of S sources, float64 (S,).
        labels: names of the sources in the names of metrics.
        is_teacher: whether each source is a teacher's, bool (S,).

    Returns:
        "loss" in nats a token and "bits_per_byte". With teachers, both are means over the sequences of text, so that
        they compare with a run without teachers; "teacher_loss" is the mean over the sequences of teachers, and
        "judgement_accuracy" the share of the "judged" targets that are correct. If there are several sources of text,
        also "loss/LABEL" and "bits_per_byte/LABEL" of each; of several teachers, "judgement_accuracy/LABEL". A
        source without sequences has no means of its own. A mean over all sources without any sequence is NaN.
    """
    text, teachers = np.flatnonzero(~is_teacher), np.flatnonzero(is_teacher)
    means = _language_means({name: x[text].sum() for name, x in sums.items()})
    if "judged" in sums:
        judged = sums["judged"].sum()
        means |= {
            "teacher_loss": _ratio(sums["loss"][teachers].sum(), sums["weight"][teachers].sum()),
            "judgement_accuracy": _ratio(sums["correct"].sum(), judged),
            "judged": int(judged),
        }
    for source in text[sums["weight"][text] > 0] if len(text) > 1 else ():
        of_source = _language_means({name: x[source] for name, x in sums.items()})
        means |= {f"{name}/{labels[source]}": value for name, value in of_source.items()}
    for source in teachers[sums["judged"][teachers] > 0] if len(teachers) > 1 else ():
        accuracy = _ratio(sums["correct"][source], sums["judged"][source])
        means[f"judgement_accuracy/{labels[source]}"] = accuracy
    return means


def _language_means(sums: dict[str, Any]) -> dict[str, Any]:
    return {
        "loss": _ratio(sums["loss"], sums["weight"]),
        "bits_per_byte": _ratio(sums["loss"], sums["bytes"]) / math.log(2),
    }


def _ratio(total: float, weight: float) -> float:
    return float(total / weight) if weight else math.nan
