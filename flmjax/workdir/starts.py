"""The starts of a run, WORKDIR/starts.jsonl: the origin of the results of each process, and its wall time by kind.

A file beside metrics.jsonl, which is cut back to the checkpoint when a run resumes: every start keeps its entry. An
entry is written after the first update, at every checkpoint and at the end. That of a killed process is completed from
its last heartbeat.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import flmjax
from flmjax.config import ConfigError
from flmjax.disk import writing
from flmjax.workdir.heartbeat import ENDS, Heartbeat, read_heartbeat
from flmjax.workdir.metrics import Record

STARTS_FILE = "starts.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")  # beside Python and flmjax

# Kinds of work of a process; "other" is what is left, such as initialisation.
Work = Literal[
    "restoring",
    "updates",
    "compilation",
    "evaluation",
    "checkpoints",
    "growth",
    "samples",
    "data loading",
    "data preparation",
    "other",
]
WORKS: tuple[Work, ...] = get_args(Work)


class WallTime:
    """Seconds of a process by kind of work, from its creation on. One kind at a time is counted: they add up.

    Args:
        turned: called with the kind of work that begins.
    """

    def __init__(self, turned: Callable[[Work], None]) -> None:
        self._turned = turned
        self._seconds: dict[Work, float] = dict.fromkeys(WORKS, 0.0)
        self._work: Work = "other"
        self._since = time.monotonic()

    @contextlib.contextmanager
    def during(self, work: Work) -> Iterator[None]:
        """Count the time of the block as `work`; blocks inside it count as their own."""
        outer_work = self._work
        self._turn_to(work)
        try:
            yield
        finally:
            self._turn_to(outer_work)

    def seconds(self) -> dict[Work, float]:
        """Seconds of each kind so far."""
        self._turn_to(self._work)
        return dict(self._seconds)

    def _turn_to(self, work: Work) -> None:
        now = time.monotonic()
        self._seconds[self._work] += now - self._since
        self._since = now
        if work != self._work:
            self._work = work
            self._turned(work)


class StartEntry:
    """The entry of this process in WORKDIR/starts.jsonl; the block of `with` is the time that the process works.

    Nothing is written before the first call of `write`, so that a refused command leaves no file. Environment variables
    are not stored: they may hold secrets.

    Args:
        workdir: of the run, locked by this process.

    Attributes:
        continues: whether the process goes on with the run after this entry, which then is not its end.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir, self._path = workdir, workdir / STARTS_FILE
        self._before: bytes | None = None  # the entries of the starts before; None: they are not read yet
        self._is_stored = self.continues = False
        self._values: Record = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        self.heartbeat = Heartbeat(workdir, self._entry)
        self.time = WallTime(self.heartbeat.turn)

    def __enter__(self) -> "StartEntry":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._is_stored:
            self.write()
        if self.continues:
            self.heartbeat.turn("restoring")
        else:
            self.heartbeat.end(is_finished=error is None)

    def begin(self, first_step: int) -> None:
        """Begin the run's work at update `first_step`: from now on the run has a heartbeat.

        The entry of a process that was killed is completed from its heartbeat, which is overwritten.
        """
        from flmjax.sharding.processes import is_writer

        self.add(first_step=first_step, last_step=first_step)
        if not is_writer():
            return
        self._starts_before()
        self.heartbeat.begin()

    def add(self, **values: object) -> None:
        """Set values of the entry, which the next `write` stores."""
        self._values |= values

    def updated(self, step: int) -> None:
        """Note that update `step` of the run is made."""
        self._values["last_step"] = step
        self.heartbeat.beat()

    def write(self, **values: object) -> None:
        """Store the entry with these values and the wall time so far; a kill leaves the old file or the new one."""
        from flmjax.sharding.processes import is_writer

        self.add(**values)
        if not is_writer():
            return
        before = self._starts_before()
        self._replace(before + _line(self._entry()))
        self._is_stored = True

    def _starts_before(self) -> bytes:
        """The entries of the starts before, complete; the first call stores them, and finds the origin of this one."""
        if self._before is None:
            stored = self._path.read_bytes() if self._path.exists() else b""
            self._before = b"".join(line + b"\n" for line in _completed(stored.splitlines(), self._workdir))
            if self._before != stored:
                self._replace(self._before)
            self._values = {**_origin(), **self._values}
        return self._before

    def _entry(self) -> Record:
        """The entry as it stands now."""
        seconds = {work: round(value, 3) for work, value in self.time.seconds().items()}
        return {**self._values, "seconds": seconds}

    def _replace(self, content: bytes) -> None:
        partial = self._path.with_suffix(".tmp")
        with writing(partial):
            partial.write_bytes(content)
        partial.replace(self._path)


def _line(entry: Record) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _completed(lines: list[bytes], workdir: Path) -> list[bytes]:
    """The lines of starts.jsonl, the last one completed from the heartbeat of a process that has not come to its end.

    A process that was killed before its first update has no line; it gets one.
    """
    beat = read_heartbeat(workdir)
    if beat is None or beat.get("state") in ENDS or not _is_start(beat["start"]):
        return lines
    try:
        is_its = json.loads(lines[-1])["date"] == beat["start"].get("date") if lines else False
    except (ValueError, KeyError, TypeError):
        is_its = False
    return [*(lines[:-1] if is_its else lines), _line(beat["start"]).rstrip(b"\n")]


def read_starts(workdir: Path) -> list[Record]:
    """The entries of WORKDIR/starts.jsonl in order; [] without the file, which older versions did not write.

    The last entry, of a process that is at work or was killed, is as new as its heartbeat.

    Raises:
        ConfigError: naming a line that is not a JSON object.
    """
    path = workdir / STARTS_FILE
    entries = []
    stored = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(_completed(stored, workdir), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not _is_start(entry):
            raise ConfigError(f"{path}: line {number} is not an entry of a start: {line[:60]!r}; delete that line")
        entries.append(entry)
    return entries


def _is_start(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    seconds, versions = entry.get("seconds"), entry.get("versions")
    is_table = isinstance(seconds, dict | None) and isinstance(versions, dict | None)
    return is_table and all(isinstance(value, int | float | None) for value in (seconds or {}).values())


def _origin() -> Record:
    """What the results of this process depend on beside the config: machine, command line and versions."""
    import jax

    program = "flmjax" if Path(sys.argv[0]).name in ("flmjax", "__main__.py") else sys.argv[0]
    versions = {"python": platform.python_version(), "flmjax": flmjax.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "folder": os.getcwd(),
        "versions": versions,
        **checkout(Path(flmjax.__file__).parent),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def checkout(package: Path) -> Record:
    """Commit of the git checkout that tracks the files of `package`, and whether it has changes; {} if there is none.

    A package that is installed inside another project's checkout is not tracked there.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        line = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        return subprocess.run(
            line, env=environment, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "is_dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one of another user
        return {}
