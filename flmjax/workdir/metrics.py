"""The metrics of a run: metrics.jsonl and TensorBoard events."""

import json
import math
import os
import textwrap
import time
from pathlib import Path
from typing import Any

from flmjax.config import ConfigError
from flmjax.disk import writing
from flmjax.workdir.storage import run_path

Record = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
SURROGATES = "backslashreplace"  # half a UTF-16 pair in a sample becomes a JSON escape instead of ending the run


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and to the TensorBoard events in WORKDIR/tensorboard, in one process of the run.

    A run that resumes at step s wrote lines past s before it was interrupted; they are removed on opening, so that the
    file has one line per kind and step however often the run was interrupted. Lines of roll-backs all stay.

    Args:
        workdir: created if absent.
        resume_step: updates before this process starts; 0 for a fresh run.

    Raises:
        ConfigError: if a line of metrics.jsonl that is not the last one is not a metric line.
        OSError: if the folder cannot be written.
    """

    def __init__(self, workdir: Path, resume_step: int) -> None:
        from flmjax.sharding.processes import is_writer  # JAX, which readers of metrics do without

        self._is_writer, self._repeated = is_writer(), set[tuple[str, int]]()
        if not self._is_writer:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._repeated = _truncate(workdir, resume_step)
        self._path = workdir / METRICS_FILE
        self._file = self._path.open("a", encoding="utf-8", errors=SURROGATES)
        # Not at the top: it imports PyTorch where that is installed.
        from tensorboardX import SummaryWriter

        # tensorboardX names files by the second and overwrites: a quick restart would lose the events before it.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1, filename_suffix=suffix)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line {"kind": kind, "step": step, **values}; numbers go to TensorBoard too, as kind/name.

        Values are numbers, strings or None; arrays of one element count as numbers. JSON has no NaN and no infinity:
        both become null. A line that the file already has for the step at which the run resumed is not written again.
        """
        if not self._is_writer or (kind, step) in self._repeated:
            return
        line = {"kind": kind, "step": int(step), **{name: _plain(value) for name, value in values.items()}}
        with writing(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, global_step=line["step"])

    def write_text(self, name: str, text: str, step: int) -> None:
        """Add a text to TensorBoard, where it is shown as it stands: a block of code in Markdown."""
        if not self._is_writer:
            return
        block = textwrap.indent(text.encode(errors=SURROGATES).decode(), "    ", lambda _: True)
        self._board.add_text(name, block, global_step=step)

    def has(self, kind: str, step: int) -> bool:
        """Whether the file has a line of this kind for `step`, at which the run resumed; only the writer knows."""
        return (kind, step) in self._repeated

    def close(self) -> None:
        """Flush and close the file and the events."""
        if not self._is_writer:
            return
        with writing(self._path):
            self._file.close()
        self._board.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[Record]:
    """The lines of WORKDIR/metrics.jsonl in order; [] without the file. An incomplete last line is left out.

    Raises:
        ConfigError: naming an earlier line that is not a JSON object with "kind" and "step".
    """
    path = run_path(os.fspath(workdir), "workdir") / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["kind"], record["step"] = str(record["kind"]), int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if number < len(lines):  # a newline follows, so this line was written to its end
                raise ConfigError(f"{path}: line {number} is not a line of metrics: {line[:60]!r}") from error
        else:
            records.append(record)
    return records


def _truncate(workdir: Path, resume_step: int) -> set[tuple[str, int]]:
    """Remove lines past `resume_step`, a growth at that step and an incomplete line.

    The checkpoint of a step is of the state before a growth at that step: the growth is done again, or comes later if
    the stage is longer now.

    Returns:
        (kind, step) of the lines at `resume_step`.
    """
    path = workdir / METRICS_FILE
    kept = [
        record
        for record in read_metrics(workdir)
        if record["kind"] == "roll_back"
        or record["step"] < resume_step
        or (record["step"] == resume_step and record["kind"] != "growth")
    ]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    if path.exists() and path.read_bytes() != text.encode(errors=SURROGATES):
        temporary = path.with_suffix(".tmp")
        with writing(temporary), temporary.open("w", encoding="utf-8", errors=SURROGATES) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)  # atomic: a kill leaves the old file or the new one
    at_resume = (record for record in kept if record["step"] == resume_step and record["kind"] != "roll_back")
    return {(record["kind"], record["step"]) for record in at_resume}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a scalar array of JAX or NumPy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
