"""Metrics of updates that the devices still compute: fetched late, so that the devices never wait for the host."""

import collections
import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np

AHEAD = 2  # updates that are dispatched after the one that the host waits for


class Fetched(NamedTuple):
    """Metrics of an update on the host, and the time (time.monotonic) at which the host knew that it was complete."""

    step: int
    metrics: dict[str, np.ndarray]
    finished: float


@dataclasses.dataclass
class _Pending:
    step: int
    metrics: dict[str, jax.Array]
    finished: float | None = None

    def wait(self) -> float:
        """Wait until the update is complete, and return when it was."""
        if self.finished is None:
            jax.block_until_ready(self.metrics["loss"])
            self.finished = time.monotonic()
        return self.finished


class PendingMetrics:
    """Metrics of dispatched updates, in their order.

    The host waits for the update AHEAD before the newest, which keeps AHEAD updates in the queue of the devices.
    Metrics are copied once every `window` updates, for the window before the newest, whose updates are complete.

    Args:
        window: updates between two lines of metrics.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._pending: collections.deque[_Pending] = collections.deque()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> list[Fetched]:
        """Add an update that was just dispatched; returns the metrics that are due."""
        self._pending.append(_Pending(step, metrics))
        if len(self._pending) > AHEAD:
            self._pending[-1 - AHEAD].wait()
        return [] if step % self._window else self._fetch(step - max(self._window, AHEAD))

    def flush(self) -> list[Fetched]:
        """The metrics of all updates; waits for the newest."""
        return self._fetch(self._pending[-1].step) if self._pending else []

    def _fetch(self, last: int) -> list[Fetched]:
        due: list[_Pending] = []
        while self._pending and self._pending[0].step <= last:
            due.append(self._pending.popleft())
        times = [update.wait() for update in due]
        fetched: list[Any] = jax.device_get([update.metrics for update in due])
        return [Fetched(update.step, x, at) for update, x, at in zip(due, fetched, times, strict=True)]
