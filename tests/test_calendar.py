"""The calendar of a run: the interval between saves, and days with failures, against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flmjax.planning.calendar import (
    Operation,
    Phase,
    best_interval,
    calendar,
    default_hours_between_failures,
    expected_seconds,
    simulated_seconds,
)


def test_the_best_interval_is_the_worked_example():
    assert best_interval(8, 10_000) == pytest.approx(400 * (1 + 0.02 / 3 + 0.0004 / 9) - 8)
    assert best_interval(50, 20) == 20


@given(save=st.floats(1, 300), hours=st.floats(2, 300))
@settings(max_examples=50, deadline=None)
def test_no_other_interval_loses_less(save, hours):
    between = hours * 3600
    best = best_interval(save, between)
    least = expected_seconds(Phase(1e6, best, save, 600), between)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert least <= expected_seconds(Phase(1e6, best * factor, save, 600), between)


@pytest.mark.parametrize(
    "phase", [Phase(2e6, 3600, 30, 900), Phase(2e6, 20_000, 10, 60), Phase(5e5, 500, 100, 20_000)], ids=str
)
def test_simulated_runs_have_the_expected_mean(phase):
    between = 40_000.0
    runs = simulated_seconds(phase, between, seed=1)
    error = runs.std() / math.sqrt(len(runs))
    assert abs(runs.mean() - expected_seconds(phase, between)) < 4 * error
    assert error < 0.01 * runs.mean()


def test_without_failures_a_run_takes_its_work_and_its_saves():
    phase = Phase(work=10_000, interval=1_000, save=5, restart=600)
    assert expected_seconds(phase, 1e12) == pytest.approx(10_050)
    np.testing.assert_allclose(simulated_seconds(phase, 1e12, seed=0), 10_050)


def test_a_calendar_adds_its_phases():
    phases = [Phase(1e6, 3600, 10, 900), Phase(5e5, 1800, 20, 900)]
    days = calendar(phases, steps=1.4e6, operation=Operation(hours_between_failures=100))
    assert days.pure == pytest.approx(1.4e6 / 86_400)
    assert days.expected == pytest.approx(sum(expected_seconds(phase, 360_000) for phase in phases) / 86_400)
    assert days.pure < days.expected < days.percentile < 1.2 * days.expected
    assert days.failures == pytest.approx(days.expected * 24 / 100)


def test_failures_grow_with_the_machine():
    assert default_hours_between_failures(192) == pytest.approx(125)  # 1e-3 a device and day
    assert default_hours_between_failures(384) == pytest.approx(62.5)
