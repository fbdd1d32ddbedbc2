"""The roll-backs of a run, WORKDIR/roll_backs.jsonl: where it went back, and the samples that it leaves out since then.

A roll-back is recorded, then its target is read, and then the checkpoints past it are removed. A process that finds a
record which is not complete goes on there: a kill at any moment leaves a run that has not rolled back, or one that has,
and a target that cannot be read leaves the newer checkpoints.
"""

import dataclasses
import json
import os
from pathlib import Path

from flmjax.config import ConfigError, stored_entry
from flmjax.config.sample_ranges import Ranges, SampleRange, join_ranges, parse_ranges
from flmjax.disk import writing
from flmjax.sharding.processes import is_writer, text_from_writer
from flmjax.workdir.metrics import MetricsWriter, Record, read_metrics
from flmjax.workdir.paths import checkpoint_directory, remove_certificates
from flmjax.workdir.storage import is_url, remove_tree

ROLL_BACKS_FILE = "roll_backs.jsonl"


@dataclasses.dataclass(frozen=True)
class RollBack:
    """One roll-back of a run.

    Attributes:
        from_step: the update that spiked, or the last of those that were not finite.
        to_step: the step of the checkpoint that the run went back to.
        first_sample, end_sample: samples first_sample to end_sample - 1 of the stream are left out from then on.
        loss: of the update; None if it is not finite.
        reason: why the run went back, in words.
        is_complete: whether the checkpoints past `to_step` are removed.
    """

    from_step: int
    to_step: int
    first_sample: int
    end_sample: int
    loss: float | None
    reason: str
    is_complete: bool = False


def read_roll_backs(workdir: Path) -> list[RollBack]:
    """The roll-backs of the run in `workdir`, in order of time.

    Raises:
        ConfigError: naming a line that is not a record of a roll-back.
    """
    path = workdir / ROLL_BACKS_FILE
    records = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
        name = f"{path}: line {number}"
        try:
            stored = json.loads(line)
        except ValueError:
            raise ConfigError(f"{name} is not a record of a roll-back: {line[:60]!r}") from None
        record = RollBack(
            from_step=stored_entry(stored, "from_step", int, name),
            to_step=stored_entry(stored, "to_step", int, name),
            first_sample=stored_entry(stored, "first_sample", int, name),
            end_sample=stored_entry(stored, "end_sample", int, name),
            loss=None if stored.get("loss") is None else float(stored_entry(stored, "loss", float, name)),
            reason=stored_entry(stored, "reason", str, name),
            is_complete=stored_entry(stored, "is_complete", bool, name),
        )
        records.append(record)
    return records


def rolled_back_samples(workdir: Path) -> Ranges:
    """The samples that the run in `workdir` leaves out since its roll-backs; raises as read_roll_backs.

    Process 0 reads them for all: the local copies of the other hosts, and their caches of a network file system, may be
    older than the last roll-back.
    """
    records = read_roll_backs(workdir) if is_writer() else []
    ranges = join_ranges(SampleRange(record.first_sample, record.end_sample) for record in records)
    texts = json.loads(text_from_writer("rolled_back_samples", json.dumps([str(r) for r in ranges])))
    return parse_ranges(texts, str(workdir / ROLL_BACKS_FILE))


def record_roll_back(workdir: Path, roll_back: RollBack) -> None:
    """Add a roll-back to the records of the run; it takes effect when the next process, or this one, completes it."""
    _write(workdir, [*read_roll_backs(workdir), roll_back])


def roll_back_target(workdir: Path) -> int | None:
    """The step to which a recorded roll-back still has to go; None: there is none. Raises as read_roll_backs."""
    records = read_roll_backs(workdir)
    return None if not records or records[-1].is_complete else records[-1].to_step


def complete_roll_back(workdir: Path) -> None:
    """Remove what lies past the target of a roll-back that was recorded and cut off; without one nothing is done.

    Lines of metrics are removed when the run resumes from the checkpoint.
    """
    records = read_roll_backs(workdir)
    if not records or records[-1].is_complete:
        return
    remove_checkpoints_past(checkpoint_directory(workdir), records[-1].to_step)
    remove_certificates(workdir, records[-1].to_step)
    _write(workdir, [*records[:-1], dataclasses.replace(records[-1], is_complete=True)])


def remove_checkpoints_past(directory: Path, step: int) -> None:
    """Remove the checkpoints after `step`. A removal that is cut off leaves no folder that looks complete."""
    for folder in directory.iterdir() if directory.is_dir() else ():
        if folder.name.isdigit() and int(folder.name) > step:
            if not is_url(folder):
                (folder / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
            remove_tree(folder)


def log_roll_backs(workdir: Path, writer: MetricsWriter) -> None:
    """Write the line of metrics of every roll-back that has none yet; the lines outlast later roll-backs."""
    if not is_writer():
        return
    logged = sum(line["kind"] == "roll_back" for line in read_metrics(workdir))
    for record in read_roll_backs(workdir)[logged:]:
        values: Record = dataclasses.asdict(record)
        del values["is_complete"]
        writer.write("roll_back", values.pop("to_step"), **values)


def _write(workdir: Path, records: list[RollBack]) -> None:
    """Write all records; a kill leaves the old file or the new one."""
    path = workdir / ROLL_BACKS_FILE
    partial = path.with_suffix(".tmp")
    with writing(partial), partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
