"""The training loop keeps updates in the queue of the devices: it waits for old ones and copies metrics late."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flmjax.config import RunConfig, StageConfig
from flmjax.training import loop, pending
from flmjax.training.pending import AHEAD, PendingMetrics


class Devices:
    """A queue of updates: an update is computed when the host waits for it or copies its metrics."""

    def __init__(self, monkeypatch):
        self.dispatched, self.computed, self.copied, self.queues, self.lags = 0, 0, [], [], []
        monkeypatch.setattr(pending.jax, "block_until_ready", self.wait)
        monkeypatch.setattr(pending.jax, "device_get", self.copy)

    def step(self):
        self.dispatched += 1
        return {"loss": self.dispatched}

    def wait(self, update):
        self.computed = max(self.computed, update)
        self.queues.append(self.dispatched - update)

    def copy(self, metrics):
        self.copied.append([m["loss"] for m in metrics])
        if metrics:
            self.lags.append(self.dispatched - self.copied[-1][-1])
        return metrics


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_two_updates_stay_in_the_queue(monkeypatch, window):
    devices, waiting, fetched = Devices(monkeypatch), PendingMetrics(window), []
    for step in range(1, 41):
        fetched += [update.step for update in waiting.add(step, devices.step())]
        assert step - len(fetched) <= max(2 * window, AHEAD) + window
    assert min(devices.queues) == AHEAD
    assert all(lag >= window for lag in devices.lags)
    fetched += [update.step for update in waiting.flush()]
    assert fetched == list(range(1, 41))
    assert waiting.flush() == []


def test_metrics_are_copied_once_in_a_window(monkeypatch):
    devices, waiting = Devices(monkeypatch), PendingMetrics(10)
    for step in range(1, 41):
        waiting.add(step, devices.step())
    assert [len(copy) for copy in devices.copied] == [0, 10, 10, 10]


def test_the_loop_dispatches_before_it_waits(monkeypatch):
    """The learning rate and the batch of an update do not come from the devices."""
    devices = Devices(monkeypatch)
    monkeypatch.setattr(loop, "jit_stage_step", lambda *_: lambda state, *_: (state, devices.step()))
    stage = RunConfig(stages=(StageConfig(steps=20),)).schedule[0]
    state = SimpleNamespace(step=np.int32(0))
    waiting = PendingMetrics(5)
    with jax.transfer_guard("disallow"):
        for step, _, metrics in loop.run_stage(state, None, stage, lambda step: 1e-3, iter([{}] * 20)):
            waiting.add(step, metrics)
    assert devices.dispatched == 20
    assert min(devices.queues) == AHEAD
