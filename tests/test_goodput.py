"""Goodput: the wall time of a run in updates that it keeps, and in those that it made twice."""

import pytest

from flmjax.report.goodput import goodput, goodput_text


def start(first, last, **seconds):
    works = {"data_loading": "data loading"}
    return {"first_step": first, "last_step": last, "seconds": {works.get(k, k): v for k, v in seconds.items()}}


def test_updates_of_one_start_are_new():
    seconds = goodput([start(0, 30, updates=60.0, compilation=20.0, data_loading=5.0)])
    assert seconds == {"new updates": 60.0, "repeated updates": 0.0, "compilation": 20.0, "data loading": 5.0}


def test_updates_after_the_last_checkpoint_of_a_killed_start_are_repeated():
    """Updates 21 to 30 of 30 in 60 s are made again: 20 s."""
    seconds = goodput([start(0, 30, updates=60.0), start(20, 50, updates=45.0, restoring=3.0)])
    assert seconds == {"new updates": pytest.approx(85.0), "repeated updates": pytest.approx(20.0), "restoring": 3.0}


def test_a_run_that_goes_back_to_an_older_checkpoint_repeats_whole_starts():
    """The last start begins at 50: of the first, 50 of 100 updates (100 s) are kept, of the second none."""
    starts = [start(0, 100, updates=100.0), start(90, 200, updates=220.0), start(50, 300, updates=500.0)]
    seconds = goodput(starts)
    assert seconds == {"new updates": pytest.approx(550.0), "repeated updates": pytest.approx(270.0)}


def test_a_start_that_is_killed_twice_at_one_place_is_counted_twice():
    """Both begin at 20 and die at 26; the third keeps its updates."""
    starts = [start(0, 20, updates=20.0), *[start(20, 26, updates=6.0)] * 2, start(20, 40, updates=20.0)]
    assert goodput(starts) == {"new updates": pytest.approx(40.0), "repeated updates": pytest.approx(12.0)}


def test_a_start_without_updates_repeats_nothing_but_takes_time():
    seconds = goodput([start(0, 0, compilation=10.0, updates=0.0), start(0, 5, updates=5.0)])
    assert seconds == {"new updates": 5.0, "repeated updates": 0.0, "compilation": 10.0}


@pytest.mark.parametrize("entry", [{}, {"seconds": None}, {"seconds": {"updates": None}}, {"first_step": 3}])
def test_entries_that_lack_values_count_as_far_as_they_go(entry):
    """Older versions wrote no steps: their updates are new."""
    assert goodput([entry, {"seconds": {"updates": 5.0}}])["new updates"] == 5.0
    assert goodput_text([{"seconds": {"updates": 3.0, "growth": 1.0}}, entry]) == (
        "goodput 75.0% of 4.0 s in new updates; growth 25.0%"
    )


def test_the_text_has_the_shares_of_all_starts_largest_first():
    """3 h 12 min = 11,520 s: new 10,500 s, compilation 480 s, checkpoints 240 s, repeated 298 s, evaluation 2 s."""
    starts = [
        start(0, 1000, updates=5000.0, compilation=240.0, evaluation=2.0),
        start(900, 2000, updates=5798.0, compilation=240.0, checkpoints=240.0),
    ]
    starts[0]["last_step"], starts[1]["first_step"] = 5000, 4702  # 298 of 5,000 updates
    starts[1]["last_step"] = 10_500
    assert goodput_text(starts) == (
        "goodput 91.1% of 3 h 12 min in new updates; compilation 4.2%, repeated updates 2.6%, checkpoints 2.1%"
    )


def test_without_wall_time_there_is_no_text():
    assert goodput_text([]) is None
    assert goodput_text([{"first_step": 0, "last_step": 9}]) is None
