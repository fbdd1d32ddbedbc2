"""How the processes of a run speak and end together, through the key-value store of JAX's coordination service.

A thread of each process reads the store several times a second, whatever the main thread does. So the failure of one
process ends all within seconds, also those that compile, prepare data or wait in an exchange that will never complete:
JAX alone waits 95 seconds in a barrier, or ends in an abort. Processes that end by an error leave at once (os._exit).

    flmjax/ended/PROCESS   text and exit status of a process that ends before its time
    flmjax/here/PROCESS    a process that has noticed such an end
    flmjax/alive/PROCESS   a number that rises while the process lives
    flmjax/NAME            anything else that processes tell each other
"""

import contextlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from flmjax.lock import release_held
from flmjax.sharding.environment import why_unreachable

ROOT = "flmjax/"
POLL_SECONDS = 0.25
# Time in which processes that fail for the same reason have all said so: then it is printed once.
SETTLE_SECONDS = 1.5
# Time for which process 0, and the store with it, outlives the end of the others: a process without store is aborted.
LINGER_SECONDS = 0.5

_ending = threading.Lock()  # held by the thread that ends the process

Entries = dict[str, str]
Listener = Callable[[Entries], None]


class Ending(NamedTuple):
    """The end of a process before its time.

    Attributes:
        text: a line for the user.
        status: exit status.
        is_own: whether the cause is in this process; otherwise it ends because another one does.
    """

    text: str
    status: int
    is_own: bool


class Peers:
    """The processes of this run, seen from one of them.

    Args:
        client: of JAX's coordination service, connected.
        process: this process, 0 to processes - 1.
        processes: number of processes.
        address: HOST:PORT of the service, which is in process 0.
        heartbeat: seconds without a sign of life after which another process is lost.
    """

    def __init__(self, client: Any, process: int, processes: int, address: str, heartbeat: float) -> None:
        self.process, self.processes, self._address, self._heartbeat = process, processes, address, heartbeat
        self._signs: dict[str, tuple[str, float]] = {}  # newest sign of life of each process, and when it came
        self._client = client
        self._listeners: list[Listener] = []
        self._leaving = threading.Lock()
        self._ending: Ending | None = None  # of this process
        self._closed = threading.Event()
        self._wake, self.wake_file = os.pipe()
        os.set_blocking(self.wake_file, False)
        self._bytes = b""
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    # ---- what processes tell each other --------------------------------------------------------------------------

    def put(self, name: str, value: str = "") -> bool:
        """Store an entry; False if the name is taken or the store is gone."""
        try:
            self._client.key_value_set(ROOT + name, value)
        except Exception:  # the client's errors have no class of their own
            return False
        return True

    def entries(self) -> Entries:
        """All entries by name.

        Raises:
            RuntimeError: if the store is gone, that is process 0.
        """
        found = self._client.key_value_dir_get(ROOT)
        return {key.removeprefix(ROOT): value for key, value in found}

    def wait_for(self, *names: str) -> Entries:
        """Wait, for hours if need be, until all these entries exist; returns all entries.

        If another process ends meanwhile, this one does, too.
        """
        while True:
            entries = self.entries()
            if all(name in entries for name in names):
                return entries
            time.sleep(POLL_SECONDS)

    def listen(self, listener: Listener) -> None:
        """Call a function, in the thread of this object, with the entries each time they were read."""
        self._listeners.append(listener)

    def signals(self) -> bytes:
        """Numbers of the signals that came since the last call, if `wake_file` is the file of signal.set_wakeup_fd."""
        received, self._bytes = self._bytes, b""
        return received

    def _watch(self) -> None:
        first_seen: float | None = None
        beat = 0.0
        while not self._closed.is_set():
            if select.select([self._wake], [], [], POLL_SECONDS)[0]:
                self._bytes += os.read(self._wake, 512)
            try:
                if time.monotonic() - beat > self._heartbeat / 5:
                    beat = time.monotonic()
                    self._client.key_value_set(f"{ROOT}alive/{self.process}", str(beat), allow_overwrite=True)
                entries = self.entries()
                for listener in self._listeners:
                    listener(entries)
            except Exception:  # a lost coordinator is noticed by the client itself (lose)
                continue
            self._check_signs(entries)
            endings = {process: ending for process, ending in _endings(entries).items() if process != self.process}
            if endings and first_seen is None:
                first_seen = time.monotonic()
                self.put(f"here/{self.process}")
            # The main thread may be about to fail for the same reason.
            if 0 in endings or (first_seen is not None and time.monotonic() - first_seen > SETTLE_SECONDS):
                self._follow()

    def _check_signs(self, entries: Entries) -> None:
        """End this process if another one has given no sign of life for too long."""
        now = time.monotonic()
        for name, value in entries.items():
            if name.startswith("alive/") and self._signs.get(name, ("", 0.0))[0] != value:
                self._signs[name] = value, now
        for name, (_, came) in self._signs.items():
            if now - came > self._heartbeat and not self._closed.is_set():
                self.lose("no sign of life", int(name.removeprefix("alive/")))

    # ---- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop watching: the run has ended in order."""
        self._closed.set()
        os.write(self.wake_file, b"\0")

    def name(self, process: int) -> str:
        """`process 1 of 2`."""
        return f"process {process} of {self.processes}"

    def leave(self, text: str, status: int, *, is_shared: bool = False) -> NoReturn:
        """End this process at once because of its own error, and tell the others.

        Args:
            text: a line for the user.
            is_shared: whether every process is expected to fail so; then the first process prints the line alone.
        """
        with self._leaving:
            self._announce(Ending(text, status, is_own=True))
            if self.process == 0:
                _print(text if is_shared else f"{self.name(0)}: {text}")
                self._settle(range(self.processes))
                _end_once(None, status)
            first = _endings(self._settle([0]) or {}).get(0)
            is_told = first is not None and first.text == text
            _end_once(None if is_told else f"{self.name(self.process)}: {text}", status)

    def lose(self, text: str, lost: int | None = None) -> NoReturn:
        """End this process at once because another one is lost, and say which, as far as it is known.

        Args:
            text: of the error, which is printed if every process has the same.
            lost: the process that is lost; None: the one that says nothing now.
        """
        with self._leaving:
            self._end_with_others(text, lost)

    def _follow(self) -> None:
        """End this process, whose main thread is at work, because others have ended."""
        with self._leaving:
            if not self._closed.is_set():
                self._end_with_others("", None)

    def _end_with_others(self, text: str, lost: int | None) -> NoReturn:
        self._announce(Ending(text, 1, is_own=False))
        entries = self._settle(range(self.processes))
        if entries is None:
            self.lose_store()
        endings = _endings(entries)
        present = {*endings, *_present(entries), self.process}
        causes = [process for process, ending in endings.items() if ending.is_own]
        silent = [process for process in range(self.processes) if process not in present]
        gone = [lost] if lost is not None else causes or silent
        status = next((endings[process].status for process in causes if endings[process].status != 1), 1)
        is_speaker = status == 1 and min(present - {*gone}) == self.process
        _end_once((self._loss(gone) if gone else text) if is_speaker else None, status)

    def lose_store(self, is_abort: bool = False) -> NoReturn:
        """End this process at once because the store gives no answer; another thread may wait for one.

        Args:
            is_abort: C++ aborts this process: because the store, that is process 0, is lost, or for a reason that it
                has printed.
        """
        if self._ending is not None and self._ending.is_own:
            _end_once(f"{self.name(self.process)}: {self._ending.text}", self._ending.status)
        # A process that dies may close its connections before the socket that accepts new ones.
        until = time.monotonic() + LINGER_SECONDS
        while self.process and time.monotonic() < until:
            if why_unreachable(self._address) is not None:
                _end_once(self._loss([0]), 1)
            time.sleep(POLL_SECONDS / 5)
        aborted = f"{self.name(self.process)} was aborted; the lines above say why"
        _end_once(aborted if is_abort else self._loss([]), 1)

    def _loss(self, lost: list[int]) -> str:
        names = " and ".join(self.name(process) for process in lost) or "another process"
        return f"{names} {'are' if len(lost) > 1 else 'is'} lost, and the others end; start the run again to go on"

    def _announce(self, ending: Ending) -> None:
        self._ending = ending
        self.put(f"ended/{self.process}", json.dumps(ending))

    def _settle(self, processes: Iterable[int]) -> Entries | None:
        """The entries once these processes have said that they end or have noticed it, or after a while.

        None: the store is gone, and with it process 0.
        """
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                entries = self.entries()
            except Exception:
                return None
            if {*_endings(entries), *_present(entries)}.issuperset(processes):
                if self.process == 0:
                    time.sleep(LINGER_SECONDS)
                return entries
            if time.monotonic() > until:
                return entries
            time.sleep(POLL_SECONDS / 5)


def _endings(entries: Entries) -> dict[int, Ending]:
    """Endings of processes, by process."""
    found = {name.removeprefix("ended/"): value for name, value in entries.items() if name.startswith("ended/")}
    return {int(process): Ending(*json.loads(value)) for process, value in sorted(found.items())}


def _present(entries: Entries) -> list[int]:
    """Processes that have noticed the end of another one."""
    return [int(name.removeprefix("here/")) for name in entries if name.startswith("here/")]


def _print(text: str) -> None:
    os.write(2, f"flmjax: {text}\n".encode(errors="backslashreplace"))


def end_at_once(text: str, status: int) -> NoReturn:
    """Print a line and end this process, of which no other one knows yet."""
    _end_once(text, status)


def _end_once(text: str | None, status: int) -> NoReturn:
    """Print a line and end the process, without waiting for threads, peers or an exchange that will not complete.

    The first thread that comes ends the process.
    """
    _ending.acquire()
    if text is not None:
        _print(text)
    release_held()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
