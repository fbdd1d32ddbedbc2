"""Rows of the token stream: nothing lost, nothing twice, weights by position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flmjax.data.packing import make_row, num_rows

END = 9


def rows_of(tokens, offsets, length, document_attention=False):
    tokens, offsets = np.asarray(tokens, np.uint32), np.asarray(offsets, np.uint64)
    return [
        make_row(tokens, offsets, i, length, end_id=END, document_attention=document_attention)
        for i in range(num_rows(len(tokens), length))
    ]


@given(num_tokens=st.integers(2, 200), length=st.integers(1, 40))
@settings(deadline=None)
def test_each_token_is_the_input_of_exactly_one_position(num_tokens, length):
    tokens = np.arange(100, 100 + num_tokens)
    rows = rows_of(tokens, [0, num_tokens], length)
    weights = np.concatenate([row["weights"] for row in rows]).astype(bool)
    inputs = np.concatenate([row["tokens"] for row in rows])
    targets = np.concatenate([row["targets"] for row in rows])
    np.testing.assert_array_equal(inputs[weights], tokens[:-1])
    np.testing.assert_array_equal(targets[weights], tokens[1:])
    assert (inputs[~weights] == END).all()
    assert len(inputs) == len(rows) * length
    assert all(row["weights"].any() for row in rows)


def test_an_end_token_as_target_is_in_the_loss():
    """Although padding has the same id."""
    (row,) = rows_of([1, 2, END, 3, END], [0, 3, 5], 7)  # a b EOD c EOD pad pad
    assert row["tokens"].tolist() == [1, 2, END, 3, END, END, END]
    assert row["targets"].tolist() == [2, END, 3, END, END, END, END]
    assert row["weights"].tolist() == [1, 1, 1, 1, 0, 0, 0]  # the last EOD is followed by nothing


def test_no_document_with_end_token_predicts_the_next():
    (row,) = rows_of([1, 2, END, 3, 4, END], [0, 3, 6], 8, document_attention=True)
    assert row["targets"].tolist()[:5] == [2, END, 3, 4, END]
    assert row["weights"].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


def test_no_document_without_end_token_predicts_the_next():
    (row,) = rows_of([1, 2, 3, 4, 5], [0, 2, 5], 4, document_attention=True)
    assert row["targets"].tolist() == [2, 3, 4, 5]
    assert row["weights"].tolist() == [1, 0, 1, 1]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2]


def test_a_document_border_between_two_rows_has_weight_zero():
    """Segment ids and positions start again in the second row."""
    first, second = rows_of(range(1, 8), [0, 3, 5, 7], 3, document_attention=True)
    assert first["weights"].tolist() == [1, 1, 0]  # the target, in the next row, begins document 2
    assert first["segment_ids"].tolist() == [1, 1, 1]
    assert second["segment_ids"].tolist() == [1, 1, 2]
    assert second["positions"].tolist() == [0, 1, 0]
    assert second["weights"].tolist() == [1, 0, 1]


def test_a_row_inside_a_document_is_a_segment_from_position_zero():
    rows = rows_of(range(50), [0, 50], 8, document_attention=True)
    assert rows[3]["segment_ids"].tolist() == [1] * 8
    assert rows[3]["positions"].tolist() == list(range(8))
    assert rows[3]["weights"].tolist() == [1] * 8


def test_the_documents_of_a_row_are_not_limited():
    """300 documents of one token each: every token of the row is a segment."""
    rows = rows_of(range(301), range(302), 256, document_attention=True)
    assert rows[0]["segment_ids"].tolist() == list(range(1, 257))
    assert rows[0]["weights"].sum() == 0


def test_without_document_attention_borders_are_in_the_loss():
    """The row has no segments."""
    (row,) = rows_of([1, 2, 3, 4, 5], [0, 2, 5], 4)
    assert row["weights"].tolist() == [1, 1, 1, 1]
    assert sorted(row) == ["targets", "tokens", "weights"]


def test_shapes_and_types():
    (row,) = rows_of([1, 2, 3], [0, 3], 5, document_attention=True)
    types = {key: (str(value.dtype), value.shape) for key, value in row.items()}
    dtypes = {"tokens": "int32", "targets": "int32", "weights": "float32", "segment_ids": "int32", "positions": "int32"}
    assert types == {name: (dtype, (5,)) for name, dtype in dtypes.items()}


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (2, 1), (9, 1), (10, 2)])
def test_number_of_rows_of_eight(tokens, rows):
    assert num_rows(tokens, 8) == rows


@pytest.mark.parametrize("index", [-1, 2, 10**6])
def test_a_row_outside_the_stream_is_an_index_error(index):
    with pytest.raises(IndexError, match=f"row {index} of 2"):
        make_row(
            np.arange(9, dtype=np.uint32), np.array([0, 9], np.uint64), index, 4, end_id=END, document_attention=True
        )
