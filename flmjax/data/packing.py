"""Concatenate, then split: the token stream of all documents, cut into rows of equal length.

No document is truncated and nothing is padded but the tail of the last row; each token is the input of exactly one
position, except the stream's last, which nothing follows: it is only ever a target.
"""

import numpy as np


def num_rows(num_tokens: int, length: int) -> int:
    """Rows of `length` inputs that `num_tokens` tokens fill, the last one perhaps in part."""
    return -(-max(num_tokens - 1, 0) // length)


def make_row(
    tokens: np.ndarray, offsets: np.ndarray, index: int, length: int, *, end_id: int, document_attention: bool
) -> dict[str, np.ndarray]:
    """Row `index` of the stream `tokens` (T,), whose documents start at `offsets` (D + 1,), the last entry being T.

    Returns arrays of shape (length,):
        tokens, targets: int32, targets[i] follows tokens[i] in the stream; the padding holds end_id.
        weights: float32, 1 where the target counts. It is 0 on the padding, and with document_attention where the
            target starts another document. It goes by position: a true end token as target has weight 1.
        segment_ids: int32, only with document_attention: 1, 2, ... by document within the row, 0 on the padding.
        positions: int32, only with document_attention: 0, 1, ... from the start of the row and of every document.
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
    return row
