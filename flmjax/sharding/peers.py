"""How the processes of a run speak and end together, through the key-value store of JAX's coordination service.

A thread of each process reads the store several times a second, whatever the main thread does. So the failure of one
process ends all within seconds, also those that compile, prepare data or wait in an exchange that will never complete:
JAX alone waits 95 seconds in a barrier, or ends in an abort. Processes that end by an error leave at once (os._exit).

    flmjax/end/ended/PROCESS     text and exit status of a process that ends before its time
    flmjax/end/noticed/PROCESS   a process that has noticed such an end
    flmjax/end/closed/PROCESS    a process whose run has ended in order
    flmjax/end/KEY               what processes tell each other about a stop of the run
    flmjax/alive/PROCESS         a number that rises while the process lives
    flmjax/said/KEY              anything else that processes tell each other

The thread reads `end` several times a second and `alive` several times a heartbeat: traffic that grows with the square
of the number of processes is only the latter's, some MB/s with a thousand processes.
"""

import collections
import contextlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from flmjax.lock import release_held
from flmjax.sharding.environment import why_unreachable

END, ALIVE, SAID = "flmjax/end/", "flmjax/alive/", "flmjax/said/"
POLL_SECONDS = 0.25
# Time in which processes that fail for the same reason have all said so: then it is printed once.
SETTLE_SECONDS = 1.5
# Time for which process 0, and the store with it, outlives the end of the others: a process without store is aborted.
LINGER_SECONDS = 0.5
# Time for the last work of a process that ends at once: flushed streams, released locks.
FLUSH_SECONDS = 5.0

_ending = threading.Lock()  # held by the thread that ends the process

Entries = dict[str, str]
Listener = Callable[[Entries], None]


class Ending(NamedTuple):
    """The end of a process before its time.

    Attributes:
        text: a line for the user.
        status: exit status.
        is_cause: whether the process ends by an error of its own; otherwise it ends because another one does.
    """

    text: str
    status: int
    is_cause: bool


class Peers:
    """The processes of this run, seen from one of them.

    Args:
        client: connected client of JAX's coordination service.
        process: this process, 0 to processes - 1.
        processes: number of processes.
        address: HOST:PORT of the service, which is in process 0.
        heartbeat: seconds without a sign of life after which another process is lost.
    """

    def __init__(self, client: Any, process: int, processes: int, address: str, heartbeat: float) -> None:
        self.process, self.processes, self._address, self._heartbeat = process, processes, address, heartbeat
        self._signs: dict[int, tuple[str, float]] = {}  # newest sign of life of each process, and when it came
        self._client = client
        self._listeners: list[Listener] = []
        self._uses: collections.Counter[str] = collections.Counter()
        self._leaving = threading.Lock()
        self._ending: Ending | None = None  # of this process
        self._closed = threading.Event()
        self._wake, self.wake_file = os.pipe()
        os.set_blocking(self.wake_file, False)
        self._bytes = b""
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    # ---- what processes tell each other --------------------------------------------------------------------------

    def next_key(self, name: str) -> str:
        """A key that was not used before; the processes agree on it, since all use a name in the same order."""
        self._uses[name] += 1
        return f"{name}/{self._uses[name]}"

    def put(self, key: str, value: str = "", root: str = SAID) -> None:
        """Store an entry, which stays as it is if the key is taken.

        Raises:
            RuntimeError: if the store is gone, that is process 0.
        """
        try:
            self._client.key_value_set(root + key, value)
        except RuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def entries(self, root: str = END) -> Entries:
        """All entries below a root by key.

        Raises:
            RuntimeError: if the store is gone, that is process 0.
        """
        return {key.removeprefix(root): value for key, value in self._client.key_value_dir_get(root)}

    def wait_for(self, *keys: str) -> Entries:
        """Wait, for hours if need be, until all these entries exist; returns all entries that are no part of an end.

        If another process ends meanwhile, this one does, too.
        """
        while True:
            entries = self.entries(SAID)
            if all(key in entries for key in keys):
                return entries
            time.sleep(POLL_SECONDS)

    def listen(self, listener: Listener) -> None:
        """Call a function, in the thread of this object, with the entries about ends each time they were read."""
        self._listeners = [*self._listeners, listener]

    def stop_listening(self, listener: Listener) -> None:
        """Call the function of `listen` no longer."""
        self._listeners = [other for other in self._listeners if other != listener]

    def signals(self) -> bytes:
        """Numbers of the signals that came since the last call, if `wake_file` is the file of signal.set_wakeup_fd."""
        received, self._bytes = self._bytes, b""
        return received

    def _watch(self) -> None:
        """Read and answer until the run has ended; an error here would leave the process without its watch."""
        try:
            self._watch_until_closed()
        except Exception as error:
            self.leave(f"the watch of the other processes failed: {error!r}", 1)

    def _watch_until_closed(self) -> None:
        first_seen: float | None = None
        beat = 0.0
        while not self._closed.is_set():
            if select.select([self._wake], [], [], POLL_SECONDS)[0]:
                self._bytes += os.read(self._wake, 512)
            try:
                if time.monotonic() - beat > self._heartbeat / 5:
                    beat = time.monotonic()
                    self._client.key_value_set(f"{ALIVE}{self.process}", str(beat), allow_overwrite=True)
                    self._read_signs()
                entries = self.entries()
                for listener in self._listeners:
                    listener(entries)
                endings = {process: ending for process, ending in _endings(entries).items() if process != self.process}
                if endings and first_seen is None:
                    first_seen = time.monotonic()
                    self.put(f"noticed/{self.process}", root=END)
            except RuntimeError:  # a lost coordinator is noticed by the client itself (end_without_store)
                continue
            self._check_signs(_numbers_of("closed", entries))
            # The main thread may be about to fail for the same reason.
            if 0 in endings or (first_seen is not None and time.monotonic() - first_seen > SETTLE_SECONDS):
                self._follow()

    def _read_signs(self) -> None:
        now = time.monotonic()
        for process, value in self.entries(ALIVE).items():
            if self._signs.get(int(process), ("", 0.0))[0] != value:
                self._signs[int(process)] = value, now

    def _check_signs(self, closed: set[int]) -> None:
        """End this process if another one, whose run has not ended, has given no sign of life for too long."""
        now = time.monotonic()
        for process, (_, came) in self._signs.items():
            is_silent = process != self.process and now - came > self._heartbeat
            if is_silent and process not in closed and not self._closed.is_set():
                self.end_after_lost("no sign of life", process)

    # ---- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop watching: the run has ended in order."""
        with contextlib.suppress(RuntimeError):
            self.put(f"closed/{self.process}", root=END)
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
            self._announce(Ending(text, status, is_cause=True))
            if self.process == 0:
                _print(text if is_shared else f"{self.name(0)}: {text}")
                self._settle(self._have_all_answered)
                _end_once(None, status)
            first = _endings(self._settle(lambda entries: 0 in _endings(entries)) or {}).get(0)
            is_told = first is not None and first.text == text
            _end_once(None if is_told else f"{self.name(self.process)}: {text}", status)

    def end_after_lost(self, text: str, lost: int | None = None) -> NoReturn:
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
        self._announce(Ending(text, 1, is_cause=False))
        entries = self._settle(self._have_all_answered)
        if entries is None:
            self.end_without_store()
        endings = _endings(entries)
        present = {*endings, *_numbers_of("noticed", entries), self.process}
        causes = [process for process, ending in endings.items() if ending.is_cause]
        silent = {*range(self.processes)} - present - _numbers_of("closed", entries)
        gone = [lost] if lost is not None else causes or sorted(silent)
        status = next((endings[process].status for process in causes if endings[process].status != 1), 1)
        texts = [f"{self.name(process)}: {ending.text}" for process, ending in endings.items() if ending.text]
        line = self._lost_text(gone) if gone else next(iter(texts), self._lost_text([]))
        is_speaker = status == 1 and min(present - {*gone}, default=self.process) == self.process
        _end_once(line if is_speaker else None, status)

    def end_without_store(self, is_abort: bool = False) -> NoReturn:
        """End this process at once because the store gives no answer; another thread may wait for one.

        Args:
            is_abort: C++ aborts this process: because the store, that is process 0, is lost, or for a reason that it
                has printed.
        """
        if self._ending is not None and self._ending.is_cause:
            _end_once(f"{self.name(self.process)}: {self._ending.text}", self._ending.status)
        # A process that dies may close its connections before the socket that accepts new ones.
        until = time.monotonic() + LINGER_SECONDS
        while self.process and time.monotonic() < until:
            if why_unreachable(self._address) is not None:
                _end_once(self._lost_text([0]), 1)
            time.sleep(POLL_SECONDS / 5)
        aborted = f"{self.name(self.process)} was aborted; the lines above say why"
        _end_once(aborted if is_abort else self._lost_text([]), 1)

    def _lost_text(self, lost: list[int]) -> str:
        names = " and ".join(self.name(process) for process in lost) or "another process"
        return f"{names} {'are' if len(lost) > 1 else 'is'} lost, and the others end; start the run again to go on"

    def _announce(self, ending: Ending) -> None:
        self._ending = ending
        with contextlib.suppress(RuntimeError):
            self.put(f"ended/{self.process}", json.dumps(ending), END)

    def _have_all_answered(self, entries: Entries) -> bool:
        """Whether every process has ended, or has noticed that another one does."""
        answered = {*_endings(entries), *_numbers_of("noticed", entries), *_numbers_of("closed", entries)}
        return len(answered) == self.processes

    def _settle(self, is_settled: Callable[[Entries], bool]) -> Entries | None:
        """The entries about ends once `is_settled` of them, or after a while.

        None: the store is gone, and with it process 0.
        """
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                entries = self.entries()
            except Exception:
                return None
            if is_settled(entries):
                if self.process == 0:
                    time.sleep(LINGER_SECONDS)
                return entries
            if time.monotonic() > until:
                return entries
            time.sleep(POLL_SECONDS / 5)


def _endings(entries: Entries) -> dict[int, Ending]:
    """Endings of processes, by process."""
    return {
        process: Ending(*json.loads(entries[f"ended/{process}"])) for process in sorted(_numbers_of("ended", entries))
    }


def _numbers_of(kind: str, entries: Entries) -> set[int]:
    """Processes with an entry of this kind: ended, noticed or closed."""
    return {int(key.removeprefix(f"{kind}/")) for key in entries if key.startswith(f"{kind}/")}


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
    threading.Thread(target=_end_after_a_while, args=(status,), daemon=True).start()
    try:
        if text is not None:
            _print(text)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a full disk, or a stream that this thread was just writing to
                stream.flush()
        release_held()  # last: until here this process may write
    finally:
        os._exit(status)


def _end_after_a_while(status: int) -> None:
    """End the process where a pipe that nobody reads, or a store that does not answer, holds its last work up."""
    time.sleep(FLUSH_SECONDS)
    os._exit(status)
