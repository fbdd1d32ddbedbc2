"""Columns of text."""

from flmjax.text_table import duration, figure, text_table


def test_labels_are_flush_left_and_figures_flush_right():
    rows = [("", "small", "large"), ("tokens", "1 B", "12 B"), ("days", "2.00", "")]
    assert text_table(rows).splitlines() == ["        small  large", "tokens    1 B   12 B", "days     2.00"]
    assert text_table(rows, left=2).splitlines()[1] == "tokens  1 B     12 B"


def test_short_durations_are_in_milliseconds():
    """The step of a small model was 0.0 s."""
    assert [duration(s) for s in (0.0, 0.00123, 0.0999, 0.1, 95.04, 900.0, 12345.6)] == [
        *("0.0 s", "1.2 ms", "99.9 ms", "0.1 s", "95.0 s", "15 min", "3 h 25 min")
    ]


def test_figures_have_three_digits():
    """The days of a small run were 0.0."""
    values = (0.00123, 7.0512, 12.0, 99.94, 99.96, 32490.4, None, float("nan"))
    assert [figure(x) for x in values] == ["0.00123", "7.05", "12.0", "99.9", "100", "32,490", "-", "-"]
