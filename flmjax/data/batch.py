"""`Batch`: the arrays of a batch on the host and on the devices, and their shapes and dtypes alone."""

from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from flmjax.config import DataConfig


class Batch(TypedDict, total=False):
    """B sequences of L tokens, each of text or of a teacher's propositions: a plain dictionary of arrays.

    Every batch has
        tokens, int32 (B, L): ids of the inputs. Padding, at the end of a sequence, has the id of the end token.
        targets, int32 (B, L): the token that follows each input. Padding has the id of the end token.
        weights, float32 (B, L): factor of each target's cross-entropy. 1 in text, data.teacher_weight on the tokens of
            a mark, and 0 on a proposition's other tokens, on padding, and where data.document_attention keeps documents
            apart and the target is the first token of the next document. A true end token has the weight of its place,
            although padding has the same id.
        bytes, float32 (B,): UTF-8 bytes of text that the weighted targets stand for (round_trip.py); 0 in a sequence of
            propositions.
    A batch of sequences with segments (BatchKind.segments) also has
        segment_ids, int32 (B, L): 1, 2, ... for the documents of a sequence, which do not attend to one another, and 0
            on padding. Text without data.document_attention is one segment.
        positions, int32 (B, L): 0, 1, ... from the start of every segment.
    If the data have teachers (BatchKind.teachers), also
        decisive, float32 (B, L): 1 where the target is the token of a mark that decides the judgement, else 0.
        marks, int32 (B, 2): ids of the true and of the false mark at the deciding token; in a sequence of text 0 and 0.

    A sample of the training stream has the same entries for one sequence, without the axis B.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    bytes: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    decisive: np.ndarray
    marks: np.ndarray


class BatchKind(NamedTuple):
    """Optional entries of a run's batches: `segments` for segment_ids and positions, `teachers` for decisive and marks.

    Data with teachers have segments, because no proposition may attend to another.
    """

    segments: bool
    teachers: bool

    @classmethod
    def of(cls, data: DataConfig, teachers: bool) -> "BatchKind":
        """The kind of data with these settings, with or without teachers."""
        return cls(segments=data.document_attention or teachers, teachers=teachers)


def abstract_batch(
    kind: BatchKind, rows: int, length: int, sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a Batch of `rows` sequences of `length` tokens on the devices."""
    per_token = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    if kind.segments:
        per_token |= {"segment_ids": np.int32, "positions": np.int32}
    if kind.teachers:
        per_token |= {"decisive": np.float32}
    entries = {name: ((rows, length), dtype) for name, dtype in per_token.items()}
    if kind.teachers:
        entries["marks"] = ((rows, 2), np.int32)
    shapes = {name: jax.ShapeDtypeStruct(*entry, sharding=sharding) for name, entry in entries.items()}
    return {**shapes, "bytes": jax.ShapeDtypeStruct((rows,), np.float32, sharding=sharding)}


def data_host(sharding: jax.sharding.Sharding, rows: int) -> dict[str, int]:
    """Arguments of TrainingStream.batches that select the sequences on this process's devices.

    Processes whose devices hold the same sequences, as along the tensor axis of a mesh, are one data host.

    Args:
        sharding: of the sequences over the devices of all processes.
        rows: sequences of a batch.
    """
    slices = sharding.addressable_devices_indices_map((rows,)).values()
    held = np.unique(np.concatenate([np.arange(rows)[index] for index in slices if index is not None]))
    assert held[-1] - held[0] + 1 == len(held), "a process holds sequences that are not consecutive"
    return {"host": int(held[0]) // len(held), "hosts": rows // len(held)}


def global_batch(batch: Batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """A Batch on the devices of all processes.

    Args:
        batch: the sequences of this process's data host.
        sharding: of the sequences over the devices.
    """
    if sharding.is_fully_addressable:  # one process: one call for all arrays takes half the time
        return jax.device_put(dict(batch), sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def split_over_devices(arrays: Any, sharding: jax.sharding.Sharding) -> Any:
    """A tree of arrays that every process holds completely, on the devices of all processes: their first axis is split.

    Args:
        sharding: of the first axis over the devices.
    """
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)
