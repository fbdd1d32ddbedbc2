"""A run that must end early (SIGTERM, SIGUSR1, Ctrl-C or a time limit) saves its state: the same command continues it.

All processes must stop after the same update. The run has stop points, after each update and around a growth, and every
process counts those that it has passed. Once a process is told to stop:

1. Each process publishes its count, and waits at its next stop point until all counts are known.
2. All stop at the point after the largest count, which no process has passed yet.

A background thread (sharding/peers.py) exchanges the counts: a run that nobody stops pays nothing, and a signal is
answered while the main thread waits for a device or a compiler.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from flmjax.interrupt import INTERRUPTED_STATUS, PREEMPTIONS, STARTED, Stopped
from flmjax.sharding.peers import END, Entries, Peers, end_at_once
from flmjax.sharding.processes import is_writer, run_peers

ENDED = 2**62  # stop points that a process has passed at the end of its run


class Stopping:
    """The early stop of a run. The block of `with` is the run; its signals are handled.

    Until `deferred` nothing has to be saved: a signal ends the process at once, as an exception. Signals are handled in
    the main thread of a process alone, as Python demands. Once the run stops, further signals of preemption are
    ignored: they would cut off the closing of its files.

    Args:
        limit: seconds since the start of the process after which the run ends; None: no limit. Process 0 has the clock.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit, self._peers = limit, run_peers()
        self._agreement = None if self._peers is None else _Agreement(self._peers)
        self._reason: str | None = None
        self._is_deferred, self._is_stopping, self._interrupts = False, False, 0

    def __enter__(self) -> "Stopping":
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._handlers = {number: signal.signal(number, self._handle) for number in PREEMPTIONS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._agreement is not None:
            self._agreement.close()
        if self._is_main:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block, a signal ends the run at the next point instead of at once; a second Ctrl-C still does."""
        self._is_deferred = True
        interrupt = signal.signal(signal.SIGINT, self._handle) if self._is_main else None
        peers = self._peers if self._is_main else None  # one process alone leaves the wake-up file to asyncio
        wake_file = -1 if peers is None else signal.set_wakeup_fd(peers.wake_file)
        try:
            yield
            if self._agreement is not None:
                self._agreement.end()
        finally:
            if self._is_main:
                signal.signal(signal.SIGINT, interrupt)
            if peers is not None:
                signal.set_wakeup_fd(wake_file)
            self._is_deferred = False

    def reached(self) -> bool:
        """Whether the run stops here. Every process calls it at the same stop points, in the same order."""
        if self._limit is not None and time.monotonic() - STARTED > self._limit and is_writer():
            self._request(f"its limit of time, stop_after_seconds={self._limit:g}")
        if self._agreement is None:
            return self._reason is not None
        return self._agreement.reached()

    @property
    def stopped(self) -> Stopped:
        """The exception that ends the run, once `reached`."""
        reason = self._reason if self._agreement is None else self._agreement.reason
        assert reason is not None
        self._is_stopping = True
        return Stopped(reason, is_agreed=True)

    def _request(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._agreement is not None:
            self._agreement.request(reason)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._is_stopping and number in PREEMPTIONS:
            return
        if not self._is_deferred:
            self._is_stopping = True
            raise Stopped(name)
        self._interrupts += number == signal.SIGINT and self._agreement is None  # which counts them itself
        if self._interrupts > 1:
            _end_at_once(self._peers)
        self._request(name)


class _Agreement:
    """Agreement of several processes on the stop point at which all stop."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._key = peers.next_key("stop")
        self._lock = threading.Lock()
        self._request: str | None = None  # reason for which this process wants to stop
        self._interrupts = 0
        self._passed = 0  # stop points
        self._published: int | None = None  # of _passed, when another process or this one wanted to stop
        self._last: int | None = None  # number of the point at which all stop
        self._agreed = threading.Event()
        self.reason: str | None = None
        peers.listen(self._notice)

    def close(self) -> None:
        """Read no more signals and counts."""
        self._peers.stop_listening(self._notice)

    def request(self, reason: str) -> None:
        """Let all processes stop; called by signal handlers, so it takes no lock."""
        self._request = self._request or reason

    def reached(self) -> bool:
        """Count a stop point; whether all processes stop there."""
        with self._lock:
            if self._published is None:
                self._passed += 1
                return False
        self._agreed.wait()
        assert self._last is not None
        self._passed += 1
        return self._passed >= self._last

    def end(self) -> None:
        """Tell the others that this process has come to the end of the run: it passes no further point."""
        with self._lock:
            if self._published is not None:
                return
            self._published = ENDED
        self._peers.put(self._count_key, str(ENDED), END)

    @property
    def _count_key(self) -> str:
        return f"{self._key}/passed/{self._peers.process}"

    def _notice(self, entries: Entries) -> None:
        """Read what the others say, and answer; called several times a second by the thread of the peers.

        What could not be stored is stored at the next call: `entries` tells whether it was.
        """
        for number in self._peers.signals():
            if number in (signal.SIGINT, *PREEMPTIONS):
                self.request(signal.Signals(number).name)
            self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _end_at_once(self._peers)
        reason_key = f"{self._key}/reason"
        if self._request is not None and reason_key not in entries:
            self._peers.put(reason_key, self._request, END)
            entries = self._peers.entries()
        if reason_key not in entries or self._agreed.is_set():
            return
        with self._lock:
            if self._published is None:
                self._published = self._passed
        if self._count_key not in entries:
            self._peers.put(self._count_key, str(self._published), END)
            entries = self._peers.entries()
        counts = [int(value) for key, value in entries.items() if key.startswith(f"{self._key}/passed/")]
        if len(counts) == self._peers.processes:
            self.reason, self._last = entries[reason_key], max(counts) + 1
            self._agreed.set()


def _end_at_once(peers: Peers | None) -> NoReturn:
    text = "interrupted twice: nothing more is saved; run the same command again to go on"
    if peers is not None:
        peers.leave(text, INTERRUPTED_STATUS, is_shared=True)
    end_at_once(text, INTERRUPTED_STATUS)
