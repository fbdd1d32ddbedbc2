"""The end of a run before its last step: SIGTERM, SIGUSR1, Ctrl-C or a limit of time; the run saves and goes on later.

All processes end after the same update. Each counts the points of the run at which it may end: the counts are equal
where the processes are at the same point, because all run the same program. Once a process is asked to stop, every
process tells the others how many points it has passed, and goes past its next point only when all have told. The run
ends at the point after the largest count: no process has passed it, and all come to it. This costs a run that is not
asked to stop nothing: a thread of each process (sharding/peers.py) reads and answers, and wakes at a signal even while
the main thread waits for a device or a compiler.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from flmjax.interrupt import STARTED, STATUS, Stopped
from flmjax.sharding.peers import Entries, Peers, end_at_once
from flmjax.sharding.processes import is_writer, peers

PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)  # of Slurm, Kubernetes and others; SIGUSR1 by choice of the user
ENDED = 2**62  # points that a process has passed at the end of its run


class Stopping:
    """The end of a run that was asked for. The block of `with` is the run; its signals are handled.

    Until `deferred` nothing has to be saved: a signal ends the process at once, as an exception. Signals are handled in
    the main thread of a process alone, as Python demands.

    Args:
        limit: seconds since the start of the process after which the run ends; None: no limit. Process 0 has the clock.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit, self._peers = limit, peers()
        self._agreement = None if self._peers is None else _Agreement(self._peers)
        self._reason: str | None = None
        self._is_deferred, self._interrupts = False, 0

    def __enter__(self) -> "Stopping":
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._handlers = {number: signal.signal(number, self._handle) for number in PREEMPTIONS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block, a signal ends the run at the next point instead of at once; a second Ctrl-C still does."""
        self._is_deferred = True
        interrupt = signal.signal(signal.SIGINT, self._handle) if self._is_main else None
        company = self._peers if self._is_main else None  # one process alone leaves the wake-up file to asyncio
        wake_file = -1 if company is None else signal.set_wakeup_fd(company.wake_file)
        try:
            yield
            if self._agreement is not None:
                self._agreement.end()
        finally:
            if self._is_main:
                signal.signal(signal.SIGINT, interrupt)
            if company is not None:
                signal.set_wakeup_fd(wake_file)
            self._is_deferred = False

    def reached(self) -> bool:
        """Whether the run ends here. Every process calls it at the same points of the run, in the same order."""
        if self._limit is not None and time.monotonic() - STARTED > self._limit and is_writer():
            self._ask(f"its limit of time, stop_after_seconds={self._limit:g}")
        if self._agreement is None:
            return self._reason is not None
        return self._agreement.reached()

    @property
    def stopped(self) -> Stopped:
        """The exception that ends the run, once `reached`."""
        reason = self._reason if self._agreement is None else self._agreement.reason
        assert reason is not None
        return Stopped(reason, is_agreed=True)

    def _ask(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._agreement is not None:
            self._agreement.ask(reason)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._is_deferred:
            raise Stopped(name)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _end_at_once(self._peers)
        self._ask(name)


class _Agreement:
    """Agreement of several processes on the point of the run at which all end."""

    def __init__(self, company: Peers) -> None:
        self._peers = company
        self._lock = threading.Lock()
        self._asked: str | None = None  # reason that this process has to tell
        self._interrupts = 0
        self._passed = 0  # points
        self._is_told = False
        self._last: int | None = None  # number of the point at which all end
        self._agreed = threading.Event()
        self.reason: str | None = None
        company.listen(self._notice)

    def ask(self, reason: str) -> None:
        """Ask all processes to end; called by signal handlers, so it takes no lock."""
        self._asked = self._asked or reason

    def reached(self) -> bool:
        """Count a point; whether all processes end there."""
        with self._lock:
            if not self._is_told:
                self._passed += 1
                return False
        self._agreed.wait()
        assert self._last is not None
        self._passed += 1
        return self._passed >= self._last

    def end(self) -> None:
        """Tell the others that this process has come to the end of the run: it passes no further point."""
        with self._lock:
            if not self._is_told:
                self._is_told = True
                self._peers.put(f"passed/{self._peers.process}", str(ENDED))

    def _notice(self, entries: Entries) -> None:
        """Read what the others say, and answer; called several times a second by the thread of the peers."""
        for number in self._peers.signals():
            if number in (signal.SIGINT, *PREEMPTIONS):
                self.ask(signal.Signals(number).name)
            self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _end_at_once(self._peers)
        if self._asked is not None and "stop" not in entries:
            self._peers.put("stop", self._asked)
            entries = self._peers.entries()
        if "stop" not in entries or self._agreed.is_set():
            return
        with self._lock:
            if not self._is_told:
                self._is_told = True
                self._peers.put(f"passed/{self._peers.process}", str(self._passed))
                entries = self._peers.entries()
        counts = [int(value) for name, value in entries.items() if name.startswith("passed/")]
        if len(counts) == self._peers.processes:
            self.reason, self._last = entries["stop"], max(counts) + 1
            self._agreed.set()


def _end_at_once(company: Peers | None) -> NoReturn:
    text = "interrupted twice: nothing more is saved; run the same command again to go on"
    if company is not None:
        company.leave(text, STATUS, is_shared=True)
    end_at_once(text, STATUS)
