"""Validation loss: the same number for every batch size, mesh and number of processes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from flmjax.config import ModelConfig
from flmjax.data.batch import Batch, global_batch
from flmjax.model.loss import loss_sums, teacher_means
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import Params
from flmjax.sharding.rules import Placement, batch_sharding, replicated, tree_shardings

LossSums = Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]]


def jit_loss_sums(config: ModelConfig, mesh: jax.sharding.Mesh) -> LossSums:
    """The jitted function (parameters, batch) -> sums of model.loss.loss_sums, without dropout."""
    placement = Placement(mesh)
    return jax.jit(
        lambda params, batch: loss_sums(params, batch, config, placement)[1],
        in_shardings=(tree_shardings(mesh, abstract_params(config)[1]), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def validation_loss(
    params: Params, rows: Batch, sums_of: LossSums, batch_size: int, token_bytes: np.ndarray, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Mean validation loss over all sequences of `rows`, computed in batches of `batch_size` sequences.

    Args:
        params: float32 parameters.
        sums_of: result of jit_loss_sums for the model on `mesh`.
        token_bytes: UTF-8 bytes of text that each id stands for, float32 (vocabulary,).

    Returns:
        "loss" in nats a token and "bits_per_byte". With teachers, both are means over the sequences of text, so that
        they compare with a run without teachers; "teacher_loss" is the mean over the sequences of teachers, and
        "judgement_accuracy" the share of the "judged" targets that are correct.
    """
    sums: dict[str, Any] = {}
    for batch in padded_batches(rows, batch_size):
        part = sums_of(params, global_batch(batch, token_bytes, batch_sharding(mesh)))
        sums = {name: sums.get(name, 0.0) + np.float64(value) for name, value in part.items()}
    return validation_means(sums)


def padded_batches(rows: Batch, size: int) -> Iterator[Batch]:
    """Batches of `size` sequences in order; the last batch is filled up with sequences of weight 0."""
    total = len(rows["weights"])
    for start in range(0, total, size):
        places = np.arange(start, start + size)
        batch: Batch = jax.tree.map(lambda x, places=places % total: x[places], rows)
        batch["weights"] = batch["weights"] * (places < total)[:, None].astype(np.float32)
        yield batch


def describe(values: dict[str, Any]) -> str:
    """One line of text with the values that validation_loss returns."""
    text = f"validation loss {values['loss']:.4f} nats a token, {values['bits_per_byte']:.4f} bits a byte"
    if "judged" in values:
        text += f", judgement accuracy {100 * values['judgement_accuracy']:.1f} % of {values['judged']}"
    return text


def validation_means(sums: dict[str, Any]) -> dict[str, Any]:
    """The means that validation_loss returns, computed from the sums of model.loss.loss_sums over all sequences."""
    if "judged" not in sums:
        return {"loss": sums["loss"] / sums["weight"], "bits_per_byte": sums["loss"] / np.log(2) / sums["bytes"]}
    with np.errstate(invalid="ignore"):  # without a sequence of one kind its mean is NaN
        means = teacher_means(sums)
    return {
        "loss": means.pop("language_loss"),
        **means,
        "judged": int(sums["judged"]) // jax.process_count(),  # every process has all sequences
    }
