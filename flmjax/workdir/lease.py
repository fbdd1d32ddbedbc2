"""The lease of a workdir on object storage, which has no file locks: an object that names the run at work there.

Every write names the version of the object that it replaces (a conditional write), so only one of two runs succeeds.
The owner renews its lease every RENEW_SECONDS; a lease that was not renewed for LEASE_SECONDS has ended. A run that was
killed leaves its lease behind. The next start takes it over at once if it runs on the same machine and sees that the
owner has ended. On another machine it watches for LEASE_SECONDS whether the lease is renewed: clocks of two hosts may
differ.
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
from flmjax.lock import SHOW, Log, Owner, released_at_sudden_end
from flmjax.workdir.storage import StorageError, access, tensorstore_spec

LEASE_FILE = ".lease"
LEASE_SECONDS = 60.0
RENEW_SECONDS = 20.0
POLL_SECONDS = 1.0
SETTLE_SECONDS = 1.0  # of two runs that write at once to a store without conditions, the second to write wins
SUDDEN_END_SECONDS = 2.0  # a process that ends at once waits so long for the store to remove its lease
# Seconds that go on while the machine is suspended, where the system counts them: the lease of a run ends meanwhile.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LeaseLostError(RuntimeError):
    """Another run has taken the workdir over; this one must not write any more."""


class StoredLease(NamedTuple):
    """A lease as the store has it.

    Attributes:
        owner: the process that holds it; None for an object that cannot be read as a lease.
        token: random number of this start; two starts never share one.
        expires: time at which it ends unless it is renewed, in seconds of the owner's clock.
        generation: version of the stored object; the store changes it at each write.
    """

    owner: Owner | None
    token: str
    expires: float
    generation: bytes

    def __str__(self) -> str:
        if self.owner is None:
            return f"a run whose lease ({LEASE_FILE}) cannot be read"
        return f"{self.owner}, whose lease lasts until {time.strftime('%H:%M:%S', time.localtime(self.expires))}"

    @property
    def is_over(self) -> bool:
        """Whether the owner has ended, as far as this host and its clock, within LEASE_SECONDS, can tell."""
        return self.owner is not None and (self.owner.is_dead or time.time() > self.expires + LEASE_SECONDS)

    @property
    def is_local(self) -> bool:
        """Whether this host can see whether the owner has ended, without watching the lease."""
        return self.owner is not None and self.owner.is_local


class Lease:
    """The lease of this process on a workdir, renewed by a thread until it is released.

    Args:
        url: URL of the workdir.
        log: prints a line.
    """

    def __init__(self, url: str, log: Log) -> None:
        self._url, self._log = url, log
        self._owner, self._token = Owner.this_process(), f"{random.SystemRandom().getrandbits(64):016x}"
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._generation, self._renewed = b"", 0.0
        self._has_written = False
        self._lost: str | None = None  # why this process has no lease any more
        with access(url):
            self._store = tensorstore.KvStore.open(tensorstore_spec(f"{url}/")).result()
        self._thread = threading.Thread(target=self._renew_until_release, daemon=True)

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            ConfigError: naming the owner, if a run is at work in the workdir.
            StorageError: for a store that does not answer.
        """
        watched, since = b"", 0.0  # generation of another run's lease, and the time at which it was seen first
        while True:
            lease, generation = self._read()
            now = time.monotonic()  # without suspension, in which a lease is neither renewed nor watched
            is_silent = lease is not None and generation == watched and now - since > LEASE_SECONDS
            if lease is None or lease.is_over or is_silent:
                if lease is not None:
                    self._log(
                        f"{self._url}: the lease of {lease.owner or 'an unknown run'}, which has ended, is taken over"
                    )
                if self._write(generation):
                    time.sleep(SETTLE_SECONDS)
                    winner, _ = self._read()
                    if winner is not None and winner.token == self._token:
                        break
                watched = b""
            elif lease.is_local or watched not in (b"", generation):  # renewed since it was seen first
                raise ConfigError(f"{self._url} is in use by {lease}; wait for its end or take another folder")
            elif not watched:
                watched, since = generation, now
                self._log(f"{self._url} was in use by {lease}; waiting until it is renewed or ends")
            time.sleep(POLL_SECONDS)
        self._thread.start()

    def confirm(self) -> None:
        """Make sure that the lease is this process's, before it writes.

        Raises:
            LeaseLostError: if another run has it.
            StorageError: if it cannot be renewed in time.
        """
        if time.clock_gettime(CLOCK) - self._renewed > LEASE_SECONDS - RENEW_SECONDS:
            self._renew()
        if self._lost is not None:
            raise LeaseLostError(f"{self._url}: this run stops writing, because {self._lost}")

    def release(self) -> None:
        """Give back the lease, if this process has it; without an answer of the store it ends by itself."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._has_written and self._lost is None:
            with contextlib.suppress(StorageError):
                lease, generation = self._read()  # a write that was cut off has left its generation unknown
                if lease is not None and lease.token == self._token:
                    with access(f"{self._url}/{LEASE_FILE}"):
                        self._store.write(LEASE_FILE, None, if_equal=generation).result()

    def release_at_sudden_end(self) -> None:
        """Give back the lease within SUDDEN_END_SECONDS, or leave it, in a process that ends at once."""
        thread = threading.Thread(target=self.release, daemon=True)
        thread.start()
        thread.join(SUDDEN_END_SECONDS)

    def _renew_until_release(self) -> None:
        while not self._stop.wait(RENEW_SECONDS) and self._lost is None:
            with contextlib.suppress(StorageError):  # the next time; `confirm` counts the seconds
                self._renew()

    def _renew(self) -> None:
        with self._mutex:
            if self._write(self._generation):
                return
            began = time.clock_gettime(CLOCK)
            lease, generation = self._read()
            if lease is not None and lease.token == self._token:  # written by a request whose answer was lost
                self._generation, self._renewed = generation, began
            elif lease is None:
                self._lost = "the lease object was removed"
            else:
                self._lost = f"another run has taken the lease over: {lease.owner or 'an unknown run'}"

    def _write(self, generation: bytes) -> bool:
        """Write the lease unless the object has changed since `generation`; returns whether it is written."""
        value = {"owner": self._owner._asdict(), "token": self._token, "expires": time.time() + LEASE_SECONDS}
        began = time.clock_gettime(CLOCK)
        self._has_written = True
        with access(f"{self._url}/{LEASE_FILE}"):
            stamp = self._store.write(LEASE_FILE, json.dumps(value).encode(), if_equal=generation).result()
        if not stamp.generation:
            return False
        self._generation, self._renewed = stamp.generation, began
        return True

    def _read(self) -> tuple[StoredLease | None, bytes]:
        """The lease, None if there is none; and the generation of the object, also of an absent one."""
        with access(f"{self._url}/{LEASE_FILE}"):
            result = self._store.read(LEASE_FILE).result()
        generation = result.stamp.generation
        if result.state == "missing":
            return None, generation
        try:
            stored = json.loads(result.value)
            owner = Owner.from_stored(stored["owner"])
            lease = StoredLease(owner, str(stored["token"]), float(stored["expires"]), generation)
        except (ValueError, TypeError, KeyError):
            lease = StoredLease(None, "", 0.0, generation)
        return lease, generation


@contextlib.contextmanager
def leased(url: str, log: Log = SHOW) -> Iterator[Lease]:
    """Keep other runs out of the workdir at `url` until the block ends; raises as Lease.acquire."""
    lease = Lease(url, log)
    with released_at_sudden_end(lease.release_at_sudden_end):
        try:
            lease.acquire()
            yield lease
        finally:
            lease.release()
