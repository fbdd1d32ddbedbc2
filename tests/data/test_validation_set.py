"""Held-out sequences: how many of each source, and what the sources are called in metrics."""

import numpy as np
import pytest

from flmjax.data.loader import spread_rows
from flmjax.data.prepared import short_names
from flmjax.evaluation.validation_loss import describe, validation_means


@pytest.mark.parametrize(
    ("counts", "rows", "per_source"),
    [
        ([(100, 101), (300, 301)], 8, [2, 6]),
        ([(1000, 1001), (3, 4), (0, 1)], 8, [6, 1, 1]),  # a small source and one without a full row
        ([(1000, 1001), (3, 4), (0, 0)], 8, [7, 1, 0]),
        ([(1000, 1001), (90, 91), (900, 901), (1, 2)], 8, [3, 1, 3, 1]),
        ([(3, 4), (2, 3)], 8, [4, 3]),
        ([(9, 10), (1, 2), (1, 2)], 2, [2, 0, 0]),  # more sources than rows
        ([(0, 1), (0, 1)], 8, [1, 1]),
        ([(0, 0)], 8, [0]),
    ],
)
def test_every_source_has_a_validation_row(counts, rows, per_source):
    chosen = spread_rows(counts, rows)
    assert [sum(source == i for source, _ in chosen) for i in range(len(counts))] == per_source
    assert len(set(chosen)) == len(chosen)
    assert all(0 <= row < counts[source][1] for source, row in chosen)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (("python_docs", "hsk_levels"), ("python_docs", "hsk_levels")),
        (("/data/en/", "/data/zh"), ("en", "zh")),
        (("/a/en/*.txt", "/a/zh/*.txt"), ("en_.txt", "zh_.txt")),
        (("/a/x", "/b/x", "/b/y"), ("a_x", "b_x", "b_y")),
        (("文/一", "文/二 三"), ("一", "二_三")),
        (("a b", "a_b"), ("0_a_b", "1_a_b")),
        (("*", "/"), ("0_source", "1_source")),
    ],
)
def test_short_names_of_sources_differ(names, short):
    """They are names of metrics: TensorBoard tags and JSON keys."""
    assert short_names(names) == short


def test_a_source_without_held_out_text_has_no_mean():
    """It may have no share of any mixture; its mean was shown as `one nan`."""
    sums = {"loss": [2.0, 0.0, 0.0], "weight": [1.0, 0.0, 0.0], "bytes": [4.0, 0.0, 0.0]}
    sums |= {"correct": [0.0, 0.0, 3.0], "judged": [0.0, 0.0, 4.0]}
    arrays = {name: np.array(values) for name, values in sums.items()}
    means = validation_means(arrays, ("many", "one", "judge"), np.array([False, False, True]))
    assert means["loss/many"] == means["loss"] == 2.0
    assert "loss/one" not in means
    assert "one" not in describe(means)
