"""Token streams to rows of equal length.

Text is concatenated, then split: no document is truncated and nothing is padded but the tail of the last row; each
token is the input of exactly one position, except the stream's last, which nothing follows: it is only ever a target.
A teacher's propositions stay whole: one cut off from its mark would teach nothing.
"""

import numpy as np

# Loss weights of a token as target, in a teacher's files.
COUNTS, DECISIVE = 1, 2  # in the loss; in the loss, and the judgement is decided there


def num_rows(num_tokens: int, length: int) -> int:
    """Rows of `length` inputs that `num_tokens` tokens fill, the last one perhaps in part."""
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
) -> dict[str, np.ndarray]:
    """Row `index` of the stream `tokens` (T,), whose documents start at `offsets` (D + 1,), the last entry being T.

    With `segments` and without document_attention the row is one segment, from position 0.

    Returns arrays of shape (length,):
        tokens, targets: int32, targets[i] follows tokens[i] in the stream; the padding holds end_id.
        weights: float32, 1 where the target counts. It is 0 on the padding, and with document_attention where the
            target starts another document. It goes by position: a true end token as target has weight 1.
        segment_ids: int32, only with either: 1, 2, ... by document within the row, 0 on the padding.
        positions: int32, only with either: 0, 1, ... from the start of the row and of every document.
    """
    start = index * length
    stream = np.asarray(tokens[start : start + length + 1]).astype(np.int32)
    used = len(stream) - 1
    if used < 1 or index < 0:
        raise IndexError(f"row {index} of {num_rows(len(tokens), length)}")
    row = {
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
        begins = np.zeros(used + 1, bool)  # per token of the stream: does a document begin here?
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


def proposition_rows(offsets: np.ndarray, length: int) -> np.ndarray:
    """First document of every row of whole documents, then D: int64 (R + 1,).

    Rows take as many as fit, in order; a document of n tokens takes n - 1 places, a longer one than the row all of it.
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
    weights: np.ndarray,
    documents: range,
    length: int,
    *,
    end_id: int,
    weight: float,
) -> dict[str, np.ndarray]:
    """A row of whole propositions, each a segment of its own; of one that is too long, the end, which has the mark.

    Args:
        tokens, offsets: of the stream, as for make_row. weights: of its tokens as targets: 0, COUNTS or DECISIVE.
        documents: of this row, as proposition_rows says.
        weight: of a target that counts.

    Returns:
        What make_row does with segments, and decisive: float32 (length,), 1 where the judgement is decided.
    """
    row = {
        "tokens": np.full(length, end_id, np.int32),
        "targets": np.full(length, end_id, np.int32),
        "weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "decisive": np.zeros(length, np.float32),
    }
    at = 0
    for segment, document in enumerate(documents, start=1):
        end = int(offsets[document + 1])
        start = max(int(offsets[document]), end - length - 1)
        here = slice(at, at + end - start - 1)
        row["tokens"][here] = tokens[start : end - 1]
        row["targets"][here] = tokens[start + 1 : end]
        row["weights"][here] = (weights[start + 1 : end] > 0) * weight
        row["decisive"][here] = weights[start + 1 : end] == DECISIVE
        row["segment_ids"][here] = segment
        row["positions"][here] = np.arange(end - start - 1)
        at = here.stop
    return row
