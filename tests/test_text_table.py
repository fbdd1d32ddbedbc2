"""Columns of text."""

from flmjax.text_table import text_table


def test_labels_are_flush_left_and_figures_flush_right():
    rows = [("", "small", "large"), ("tokens", "1 B", "12 B"), ("days", "2.00", "")]
    assert text_table(rows).splitlines() == ["        small  large", "tokens    1 B   12 B", "days     2.00"]
    assert text_table(rows, left=2).splitlines()[1] == "tokens  1 B     12 B"
