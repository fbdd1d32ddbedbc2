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


def test_b03_an_end_token_as_target_counts_though_it_is_also_the_padding():
    (row,) = rows_of([1, 2, END, 3, END], [0, 3, 5], 7)  # a b EOD c EOD pad pad
    assert row["tokens"].tolist() == [1, 2, END, 3, END, END, END]
    assert row["targets"].tolist() == [2, END, 3, END, END, END, END]
    assert row["weights"].tolist() == [1, 1, 1, 1, 0, 0, 0]  # the last EOD is followed by nothing


def test_b04_no_document_is_trained_to_predict_the_next_with_end_tokens():
    (row,) = rows_of([1, 2, END, 3, 4, END], [0, 3, 6], 8, document_attention=True)
    assert row["targets"].tolist()[:5] == [2, END, 3, 4, END]
    assert row["weights"].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


def test_b04_no_document_is_trained_to_predict_the_next_without_end_tokens():
    (row,) = rows_of([1, 2, 3, 4, 5], [0, 2, 5], 4, document_attention=True)
    assert row["targets"].tolist() == [2, 3, 4, 5]
    assert row["weights"].tolist() == [1, 0, 1, 1]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2]


def test_a_document_border_between_two_rows_has_weight_zero_and_numbers_start_again():
    first, second = rows_of(range(1, 8), [0, 3, 5, 7], 3, document_attention=True)
    assert first["weights"].tolist() == [1, 1, 0]  # the target, in the next row, begins document 2
    assert first["segment_ids"].tolist() == [1, 1, 1]
    assert second["segment_ids"].tolist() == [1, 1, 2]
    assert second["positions"].tolist() == [0, 1, 0]
    assert second["weights"].tolist() == [1, 0, 1]


def test_a_row_inside_one_long_document_is_one_segment_from_position_zero():
    rows = rows_of(range(50), [0, 50], 8, document_attention=True)
    assert rows[3]["segment_ids"].tolist() == [1] * 8
    assert rows[3]["positions"].tolist() == list(range(8))
    assert rows[3]["weights"].tolist() == [1] * 8


def test_three_hundred_one_token_documents_have_as_many_segments():
    rows = rows_of(range(301), range(302), 256, document_attention=True)  # A08: no cap on documents in a row
    assert rows[0]["segment_ids"].tolist() == list(range(1, 257))
    assert rows[0]["weights"].sum() == 0


def test_without_document_attention_borders_count_and_there_are_no_segments():
    (row,) = rows_of([1, 2, 3, 4, 5], [0, 2, 5], 4)
    assert row["weights"].tolist() == [1, 1, 1, 1]
    assert sorted(row) == ["targets", "tokens", "weights"]


def test_shapes_and_types():
    (row,) = rows_of([1, 2, 3], [0, 3], 5, document_attention=True)
    types = {key: (str(value.dtype), value.shape) for key, value in row.items()}
    whole = ("int32", (5,))
    assert types == {
        "tokens": whole, "targets": whole, "weights": ("float32", (5,)), "segment_ids": whole, "positions": whole
    }  # fmt: skip


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (2, 1), (9, 1), (10, 2)])
def test_number_of_rows_of_eight(tokens, rows):
    assert num_rows(tokens, 8) == rows


@pytest.mark.parametrize("index", [-1, 2, 10**6])
def test_a_row_outside_the_stream_is_an_index_error(index):
    with pytest.raises(IndexError, match=f"row {index} of 2"):
        make_row(
            np.arange(9, dtype=np.uint32), np.array([0, 9], np.uint64), index, 4, end_id=END, document_attention=True
        )
