"""The heartbeat of a run, WORKDIR/heartbeat.json: the age of its `time` tells a hung run from one that works.

The main thread writes it when it makes progress: at the start of every state, and after an update at most every
BEAT_SECONDS. A thread of its own would beat on in a run that hangs. A state that is one long call, such as a
compilation, has no beat until it ends: a watcher gives it more time than training.
"""

import contextlib
import datetime
import json
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEARTBEAT_FILE = "heartbeat.json"
BEAT_SECONDS = 5.0
# State of a process in each kind of work; in the other kinds, which are short or part of an update, it does not change.
STATES = {
    "restoring": "restoring",
    "compilation": "compiling",
    "updates": "training",
    "evaluation": "evaluating",
    "checkpoints": "saving",
    "growth": "growing",
    "samples": "sampling",
}
ENDS = ("finished", "stopped")  # states of a process that has come to its end; a killed one has not


class Heartbeat:
    """The heartbeat of this process; nothing is written before `begin`.

    The file has time (ISO 8601), state, step, pid, host, the last noted values and, as "start", the entry of the
    process in starts.jsonl as far as it goes: that of a killed process is completed from it.

    Args:
        workdir: of the run.
        entry: function that returns the entry of the process in starts.jsonl.
    """

    def __init__(self, workdir: Path, entry: Callable[[], dict[str, Any]]) -> None:
        self._path, self._entry = workdir / HEARTBEAT_FILE, entry
        self._state, self._has_begun, self._written = "starting", False, 0.0
        self._noted: dict[str, Any] = {}

    def begin(self) -> None:
        """Write the first beat."""
        self._has_begun = True
        self._write()

    def turn(self, work: str) -> None:
        """Write a beat if the kind of work that begins now is another state."""
        state = STATES.get(work)
        if state is not None and state != self._state:
            self._enter(state)

    def note(self, **values: float | str | None) -> None:
        """Set values that the next beats have; JSON has no NaN and no infinity, which become null."""
        is_infinite = {name: isinstance(value, float) and not math.isfinite(value) for name, value in values.items()}
        self._noted |= {name: None if is_infinite[name] else value for name, value in values.items()}

    def beat(self) -> None:
        """Write a beat if the last one is BEAT_SECONDS old."""
        if time.monotonic() - self._written >= BEAT_SECONDS:
            self._write()

    def end(self, is_finished: bool) -> None:
        """Write the last beat: the process has done its work, or stops before."""
        self._enter(ENDS[0] if is_finished else ENDS[1])

    def _enter(self, state: str) -> None:
        self._state = state
        self._write()

    def _write(self) -> None:
        """Replace the file by a new one; a beat that cannot be written is left out, and training goes on."""
        if not self._has_begun:
            return
        self._written = time.monotonic()
        start = self._entry()
        beat = {
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "state": self._state,
            "step": start.get("last_step"),
            **self._noted,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": start,
        }
        partial = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(beat) + "\n", encoding="utf-8")
            partial.replace(self._path)


def read_heartbeat(workdir: Path) -> dict[str, Any] | None:
    """The heartbeat of the run in `workdir`; None without the file, or if it is not a heartbeat."""
    try:
        beat = json.loads((workdir / HEARTBEAT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return beat if isinstance(beat, dict) and isinstance(beat.get("start"), dict) else None
