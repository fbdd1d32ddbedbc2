"""Token streams to rows: sequences of equal length, each a Batch without the axis B.

Text is concatenated, then cut into rows: no document is truncated, and only the tail of the last row is padded. Each
token is the input at exactly one place, except the last of the stream, which is a target alone, for nothing follows it.
The propositions of a teacher are not cut, because a proposition without its mark would teach nothing.
"""

import numpy as np

from flmjax.data.batch import Batch
from flmjax.data.prepared import DECISIVE


def num_rows(num_tokens: int, length: int) -> int:
    """Rows of `length` inputs that a stream of `num_tokens` tokens fills; the last may be padded."""
    return -(-max(num_tokens - 1, 0) // length)


def make_row(
    tokens: np.ndarray,
    offsets: np.ndarray,
    index: int,
    length: int,
    *,
    end_id: int,
    document_attention: bool,
    segments: bool = False,
) -> Batch:
    """Row `index` of a stream of text.

    Args:
        tokens: the stream, (T,).
        offsets: first token of each document, then T: (D + 1,).
        length: of the row, L.
        end_id: id of the padding.
        document_attention: make every document in the row a segment; a target that starts the next document has
            weight 0.
        segments: without document_attention: make the row one segment, with positions from 0.

    Returns:
        tokens, targets, weights; segment_ids and positions if one of the two flags is set: arrays (L,) as in Batch.
        Weights go by place: a true end token as target has weight 1, padding has weight 0.
    """
    start = index * length
    stream = np.asarray(tokens[start : start + length + 1]).astype(np.int32)
    used = len(stream) - 1
    if used < 1 or index < 0:
        raise IndexError(f"row {index} of {num_rows(len(tokens), length)}")
    row: Batch = {
        "tokens": np.full(length, end_id, np.int32),
        "targets": np.full(length, end_id, np.int32),
        "weights": np.zeros(length, np.float32),
    }
    row["tokens"][:used] = stream[:-1]
    row["targets"][:used] = stream[1:]
    row["weights"][:used] = 1
    if document_attention:
        ends = np.array([start, start + used + 1], offsets.dtype)  # of another dtype, NumPy would convert all offsets
        first, last = np.searchsorted(offsets, ends)
        begins = np.zeros(used + 1, bool)  # for each token of the stream: whether a document begins with it
        begins[np.asarray(offsets[first:last]).astype(np.int64) - start] = True
        row["weights"][:used][begins[1:]] = 0
        begins[0] = True
        segment = np.cumsum(begins[:-1])
        starts = np.flatnonzero(begins[:-1])
        row["segment_ids"] = np.zeros(length, np.int32)
        row["segment_ids"][:used] = segment
        row["positions"] = np.zeros(length, np.int32)
        row["positions"][:used] = np.arange(used) - starts[segment - 1]
    elif segments:
        row["segment_ids"] = (np.arange(length) < used).astype(np.int32)
        row["positions"] = np.arange(length, dtype=np.int32)
    return row


def first_propositions(offsets: np.ndarray, length: int) -> np.ndarray:
    """Index of the first of the D propositions in each of R rows, then D: int64 (R + 1,).

    Every row takes as many complete propositions as fit, in order. A proposition of n tokens takes n - 1 places; a
    proposition that is longer than a row has a row to itself.
    """
    ends = np.cumsum(np.minimum(np.diff(offsets.astype(np.int64)) - 1, length))
    firsts = [0]
    while firsts[-1] < len(ends):
        before = ends[firsts[-1] - 1] if firsts[-1] else 0
        firsts.append(int(np.searchsorted(ends, before + length, side="right")))
    return np.array(firsts, np.int64)


def make_proposition_row(
    tokens: np.ndarray,
    offsets: np.ndarray,
    loss_weights: np.ndarray,
    propositions: range,
    length: int,
    *,
    end_id: int,
    mark_weight: float,
) -> Batch:
    """A row of propositions, each a segment; of a proposition that is too long, the end, which has the mark.

    Args:
        tokens, offsets: the teacher's stream, as in make_row.
        loss_weights: of its tokens as targets: 0, COUNTS or DECISIVE, (T,).
        propositions: indices of the row's propositions.
        length: of the row, L.
        end_id: id of the padding.
        mark_weight: weight of the tokens of a mark.

    Returns:
        tokens, targets, weights, segment_ids, positions and decisive: arrays (L,) as in Batch.
    """
    row: Batch = {
        "tokens": np.full(length, end_id, np.int32),
        "targets": np.full(length, end_id, np.int32),
        "weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "decisive": np.zeros(length, np.float32),
    }
    next_place = 0
    for segment, proposition in enumerate(propositions, start=1):
        end = int(offsets[proposition + 1])
        start = max(int(offsets[proposition]), end - length - 1)
        places = slice(next_place, next_place + end - start - 1)
        row["tokens"][places] = tokens[start : end - 1]
        row["targets"][places] = tokens[start + 1 : end]
        row["weights"][places] = (loss_weights[start + 1 : end] > 0) * mark_weight
        row["decisive"][places] = loss_weights[start + 1 : end] == DECISIVE
        row["segment_ids"][places] = segment
        row["positions"][places] = np.arange(end - start - 1)
        next_place = places.stop
    return row
