"""The lease of a workdir on object storage, which has no file locks: an object that names the run at work there.

The owner renews the lease every RENEW_SECONDS; each writing is conditional on the content that the writer has seen, so
that of two runs one gets it. A lease that was not renewed for LEASE_SECONDS ends. A run that was killed leaves its
lease: the next start takes it over at once where it sees that the owner has ended, on the same host; elsewhere it
watches whether the lease is renewed, for LEASE_SECONDS at most. No clock of another host is trusted more than that.
"""

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import tensorstore

from flmjax.config import ConfigError
from flmjax.lock import SHOW, Log, Owner
from flmjax.workdir.storage import StorageError, access, tensorstore_spec

LEASE_FILE = ".lease"
LEASE_SECONDS = 60.0
RENEW_SECONDS = 20.0
POLL_SECONDS = 1.0
SETTLE_SECONDS = 1.0  # of two runs that write at once to a store without conditions, the second to write wins


class LeaseLostError(RuntimeError):
    """Another run has taken the workdir over; this one must not write any more."""


class Held(NamedTuple):
    """A lease as the store has it.

    Attributes:
        owner: the process that holds it.
        token: another for each start.
        expires: time at which it ends unless it is renewed, in seconds of the owner's clock.
        generation: of the object, another after each writing.
    """

    owner: Owner
    token: str
    expires: float
    generation: bytes

    def __str__(self) -> str:
        return f"{self.owner}, whose lease lasts until {time.strftime('%H:%M:%S', time.localtime(self.expires))}"

    @property
    def is_over(self) -> bool:
        """Whether the owner has ended, as far as this host and its clock, within LEASE_SECONDS, can tell."""
        return self.owner.is_dead or time.time() > self.expires + LEASE_SECONDS


class Lease:
    """The lease of this process on a workdir, renewed by a thread until it is released.

    Args:
        url: of the workdir.
        log: prints a line.
    """

    def __init__(self, url: str, log: Log) -> None:
        self._url, self._log = url, log
        self._owner, self._token = Owner.this_process(), f"{random.SystemRandom().getrandbits(64):016x}"
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._generation, self._renewed = b"", 0.0
        self._lost: str | None = None
        with access(url):
            self._store = tensorstore.KvStore.open(tensorstore_spec(f"{url}/")).result()
        self._thread = threading.Thread(target=self._renew_until_release, daemon=True)

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            ConfigError: naming the owner, if a run is at work in the workdir.
            StorageError: for a store that does not answer.
        """
        watched, since = b"", 0.0  # generation of another's lease, and since when it has been seen
        while True:
            held, absent = self._read()
            now = time.monotonic()
            is_silent = held is not None and held.generation == watched and now - since > LEASE_SECONDS
            if held is None or held.is_over or is_silent:
                if held is not None:
                    self._log(f"{self._url}: the lease of {held.owner}, which has ended, is taken over")
                if self._write(absent if held is None else held.generation):
                    time.sleep(SETTLE_SECONDS)
                    winner, _ = self._read()
                    if winner is not None and winner.token == self._token:
                        break
                watched = b""
            elif held.owner.is_local or watched not in (b"", held.generation):  # alive: it has been renewed
                raise ConfigError(f"{self._url} is in use by {held}; wait for its end or take another folder")
            elif not watched:
                watched, since = held.generation, now
                self._log(f"{self._url} was in use by {held}; waiting until it is renewed or ends")
            time.sleep(POLL_SECONDS)
        self._thread.start()

    def confirm(self) -> None:
        """Make sure that the lease is this process's, before it writes.

        Raises:
            LeaseLostError: if another run has it.
            StorageError: if it cannot be renewed in time.
        """
        if time.monotonic() - self._renewed > LEASE_SECONDS - RENEW_SECONDS:
            self._renew()
        if self._lost is not None:
            raise LeaseLostError(f"{self._url} is in use by {self._lost}, since this run could not renew its lease")

    def release(self) -> None:
        """Give the lease back; a store that does not answer is left to end it."""
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(ValueError, RuntimeError, StorageError):
                self._store.write(LEASE_FILE, None, if_equal=self._generation).result()

    def _renew_until_release(self) -> None:
        while not self._stop.wait(RENEW_SECONDS) and self._lost is None:
            with contextlib.suppress(StorageError):  # the next time; `confirm` counts the seconds
                self._renew()

    def _renew(self) -> None:
        with self._mutex:
            if self._write(self._generation):
                return
            held, _ = self._read()
            if held is not None and held.token == self._token:  # written by a request whose answer was lost
                self._generation, self._renewed = held.generation, time.monotonic()
            else:
                self._lost = "no run" if held is None else str(held.owner)

    def _write(self, generation: bytes) -> bool:
        """Write the lease, unless it has changed since `generation`; whether it is written."""
        value = {"owner": self._owner._asdict(), "token": self._token, "expires": time.time() + LEASE_SECONDS}
        began = time.monotonic()
        with access(f"{self._url}/{LEASE_FILE}"):
            stamp = self._store.write(LEASE_FILE, json.dumps(value).encode(), if_equal=generation).result()
        if not stamp.generation:
            return False
        self._generation, self._renewed = stamp.generation, began
        return True

    def _read(self) -> tuple[Held | None, bytes]:
        """The lease, None if there is none that can be read; and the generation of the object."""
        with access(f"{self._url}/{LEASE_FILE}"):
            result = self._store.read(LEASE_FILE).result()
        try:
            stored = json.loads(result.value)
            owner = Owner(**stored["owner"])
            held = Held(owner, str(stored["token"]), float(stored["expires"]), result.stamp.generation)
        except (ValueError, TypeError, KeyError):
            return None, result.stamp.generation
        return held, held.generation


@contextlib.contextmanager
def leased(url: str, log: Log = SHOW) -> Iterator[Lease]:
    """Keep other runs out of the workdir at `url` until the block ends; raises as Lease.acquire."""
    lease = Lease(url, log)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()
