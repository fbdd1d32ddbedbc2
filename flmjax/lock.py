"""A lock between processes: a file that names its owner by host, process number and start time.

The kernel's lock (flock) is used where the file system has it: it ends with its owner, however the owner ends. Other
file systems get a file that only one process can create; such a lock of a process that has ended is recognised on the
owner's host alone.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flmjax.config import ConfigError
from flmjax.disk import writing

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
POLL_SECONDS = 0.2
SETTLE_SECONDS = 0.3  # two processes that remove the same dead lock: the second to create its own wins

BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")  # of Linux: another content after each start of the machine

_releases: list[Callable[[], None]] = []  # each gives back a lock or a lease that this process holds

Log = Callable[[str], None]
SHOW: Log = functools.partial(print, flush=True)


class Owner(NamedTuple):
    """The process that holds a lock.

    Attributes:
        host: name of its machine.
        pid: its number there.
        start: start time of the process as the system writes it; None: unknown. A number is used again later.
        since: local date and time at which it took the lock.
        namespace: the owner's process namespace; containers on one host number their processes separately. None:
            unknown.
        boot: identifier of the start of its machine. Machines may share a host name, as pods of one name do that run
            one after the other. None: unknown.
    """

    host: str
    pid: int
    start: str | None
    since: str
    namespace: str | None = None
    boot: str | None = None

    @classmethod
    def this_process(cls) -> "Owner":
        """This process, from now on."""
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), pid, _start_time(pid), since, _process_namespace(), _boot())

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> "Owner":
        """The owner that another version of flmjax may have stored; fields that this one does not know are left out.

        Raises:
            TypeError: for a field that is missing, or another value than a mapping.
        """
        return cls(**{name: stored[name] for name in cls._fields if name in stored})

    @property
    def is_local(self) -> bool:
        """Whether this process can look up the owner's process number.

        That needs the same machine, the same boot and the same process namespace (container).
        """
        namespaces, boots = {self.namespace, _process_namespace()} - {None}, {self.boot, _boot()} - {None}
        return self.host == socket.gethostname() and len(namespaces) < 2 and len(boots) < 2

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended, as far as this host can see."""
        if not self.is_local:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # of another user
            pass
        start = _start_time(self.pid)
        return None not in (start, self.start) and start != self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def locked(path: Path, subject: str, *, wait: bool = False, log: Log = SHOW) -> Iterator[None]:
    """Keep other processes out of `subject` until the block ends; then the lock file is removed.

    Missing folders above `path` are created, and removed at the end if they are empty.

    Args:
        path: the lock file.
        subject: what the lock protects, for messages.
        wait: wait for the present owner, and log whom, instead of raising.
        log: prints a line.

    Raises:
        ConfigError: naming the owner, unless `wait`; or a lock file that this host cannot judge, with the cure.
        OSError: for a folder that cannot be written.
    """
    created: list[Path] = []
    owner, shown = Owner.this_process(), None
    try:
        while isinstance(other := _acquire(path, owner, subject, created, log), Owner):
            file = _owner_file(path)
            cure = f"; if it has ended, delete {file}" if file.exists() and not other.is_local else ""
            if not wait:
                raise ConfigError(f"{subject} is in use by {other}; wait for its end or take another folder{cure}")
            if other != shown:
                log(f"waiting for {other}, which is at work on {subject}{cure}")
                shown = other
            time.sleep(POLL_SECONDS)
        with other:
            yield
    finally:
        for folder in created:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _owner_file(path: Path) -> Path:
    """The file that stands in for the lock `path` on a file system without flock."""
    return path.with_name(f"{path.name}.owner")


def _acquire(path: Path, owner: Owner, subject: str, created: list[Path], log: Log) -> "Owner | contextlib.ExitStack":
    """A stack that releases the lock when it is closed, or the owner that holds it."""
    for folder in (path.parent, *path.parent.parents):
        if folder.exists():
            break
        created.append(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(path) or Owner("unknown host", 0, None, "a moment ago")
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise OSError(error.errno, error.strerror, str(path)) from error
            path.unlink(missing_ok=True)
            return _create(_owner_file(path), owner, subject, log)
        if not _is_same_file(path, file.fileno()):  # the owner before removed it after this process had opened it
            return _acquire(path, owner, subject, created, log)
        if (dead := _read(path)) is not None:  # an owner that ends in order removes the file
            log(f"{subject}: the lock of {dead}, which has ended, is taken over")
        file.truncate(0)
        file.write(json.dumps(owner._asdict()))
        file.flush()
        _release_later(stack, path)
        return stack.pop_all()


def _create(path: Path, owner: Owner, subject: str, log: Log) -> "Owner | contextlib.ExitStack":
    """As _acquire, without flock."""
    try:
        other = _read(path) if path.exists() else None
        if other is not None and other.is_dead:
            log(f"{subject}: the lock of {other}, which has ended, is taken over")
            path.unlink(missing_ok=True)
        with writing(path), path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(owner._asdict()))
    except FileExistsError:
        holder, age = _read(path), 0.0
        with contextlib.suppress(FileNotFoundError):  # released in this moment
            age = time.time() - path.stat().st_mtime
        if holder is None and age > 60:
            raise ConfigError(f"{path} names no process; if none is at work on {subject}, delete it") from None
        return holder or Owner("unknown host", 0, None, "a moment ago")
    if other is not None:
        time.sleep(SETTLE_SECONDS)
    if (holder := _read(path)) is not None and holder != owner:
        return holder
    stack = contextlib.ExitStack()
    _release_later(stack, path)
    return stack


@contextlib.contextmanager
def released_at_sudden_end(release: Callable[[], None]) -> Iterator[None]:
    """Let `release_held` call `release`, which gives back a lock or a lease, until the block ends."""
    _releases.append(release)
    try:
        yield
    finally:
        _releases.remove(release)


def release_held() -> None:
    """Give back the locks and leases of this process, which ends at once (os._exit): the next owner is not delayed."""
    for release in list(_releases):
        with contextlib.suppress(OSError, RuntimeError):  # the process ends for a reason that it has printed
            release()


def _release_later(stack: contextlib.ExitStack, path: Path) -> None:
    """Remove the lock file `path` when `stack` is closed, or at the sudden end of the process."""
    remove = functools.partial(path.unlink, missing_ok=True)
    stack.callback(remove)
    stack.enter_context(released_at_sudden_end(remove))


def _read(path: Path) -> Owner | None:
    """The owner that a lock file names; None for an empty or incomplete file."""
    try:
        return Owner.from_stored(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _process_namespace() -> str | None:
    """Name of the namespace in which this process has its number; None where the system has none."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _boot() -> str | None:
    """Identifier of this start of the machine; None where the system has none."""
    with contextlib.suppress(OSError):
        return BOOT_FILE.read_text(encoding="ascii").strip()
    return None


def _start_time(pid: int) -> str | None:
    """Start time of a running process; None if the process or its time cannot be seen, "ended" for a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return "ended" if fields[0] in "ZX" else fields[19]  # field 22 of the file, in clock ticks since boot
    with contextlib.suppress(OSError):  # macOS
        shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return shown.stdout.strip() or None
    return None
