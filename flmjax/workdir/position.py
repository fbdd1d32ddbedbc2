"""Where a run stands: the metadata of one of its checkpoints."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flmjax.config import ConfigError, RunConfig, Stage, stored_entry
from flmjax.config.sample_ranges import Ranges, count_samples, parse_ranges, ranges_before
from flmjax.sharding.processes import any_process, from_writer, is_writer
from flmjax.workdir.checkpoint import CheckpointError, Checkpoints, DamagedCheckpointError
from flmjax.workdir.paths import (
    checkpoint_directory,
    is_complete,
    latest_whole_step,
    saved_steps,
    valid_config,
)
from flmjax.workdir.roll_backs import roll_back_target


class Position(NamedTuple):
    """Where a run stands: the metadata of a checkpoint.

    Attributes:
        step: updates of the run.
        stage: the stage of the checkpoint, in the schedule of `config`.
        config: of the process that wrote the checkpoint, with the vocabulary's size.
        samples_seen: number in the training stream after the last sample that the run has read; skipped ones count.
        fingerprint: of the training stream.
        newest_metrics: values of the teachers and the text that no line of metrics has yet.
        skipped: samples that the training stream leaves out.
        recent_losses: of the newest updates, the newest last; NaN for one that was not finite.
    """

    step: int
    stage: Stage
    config: RunConfig
    samples_seen: int
    fingerprint: str
    newest_metrics: dict[str, float]
    skipped: Ranges = ()
    recent_losses: tuple[float, ...] = ()

    @property
    def first_sample(self) -> int:
        """Number of the run's first sample in the stream: samples that the runs before it read, as it was grown."""
        skipped = count_samples(ranges_before(self.skipped, self.samples_seen))
        return self.samples_seen - skipped - self.stage.samples_before(self.step)


def newest_position(workdir: Path) -> Position | None:
    """Position of the run in `workdir`, which may be in training; None without a complete checkpoint.

    Raises:
        ConfigError, CheckpointError: as position_at.
    """
    step = latest_whole_step(checkpoint_directory(workdir))
    if step is None:
        return None
    try:
        return position_at(workdir, step)
    except CheckpointError:
        if is_complete(checkpoint_directory(workdir) / str(step)):
            raise
        return newest_position(workdir)  # the run is in training and has deleted this checkpoint since


def resumed_position(workdir: Path, damaged: Mapping[int, str]) -> Position | None:
    """Position that training goes on from in `workdir`, which this run has locked; None without a checkpoint.

    All processes go on from the step that process 0 sees, and take its verdict on whether the metadata are damaged.
    While a roll-back is not complete, newer steps than its target are passed over.

    Args:
        damaged: reasons by the steps that cannot be read and are passed over.

    Raises:
        DamagedCheckpointError: for the newest step that is not in `damaged`, if its metadata are damaged.
        ConfigError, CheckpointError: as position_at; and if every step is in `damaged`.
    """
    directory = checkpoint_directory(workdir)
    target = roll_back_target(workdir) if is_writer() else None
    steps = [step for step in saved_steps(directory) if target is None or step <= target]
    step = from_writer(max((step for step in steps if step not in damaged), default=-1))
    if step < 0 and damaged:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in sorted(damaged.items(), reverse=True))
        raise CheckpointError(f"no checkpoint in {directory} can be read ({reasons}); nothing was deleted or renamed")
    if step < 0:
        return None
    position: Position | None = None
    error: CheckpointError | None = None
    try:
        if not is_complete(directory / str(step)):
            raise DamagedCheckpointError(directory, step, "files are missing")
        position = position_at(workdir, step)
    except CheckpointError as failure:
        error = failure
    if from_writer(isinstance(error, DamagedCheckpointError)):
        if not isinstance(error, DamagedCheckpointError):
            error = DamagedCheckpointError(directory, step, "its metadata are damaged")
        raise error
    if any_process(error is not None):  # what the writer can read is not damaged
        name = f"checkpoint {directory / str(step)}"
        raise CheckpointError(str(error or f"{name} cannot be read by another process")) from error
    return position


def position_at(workdir: Path, step: int) -> Position:
    """Position of the run in `workdir` at the checkpoint of `step`.

    Raises:
        ConfigError: naming the checkpoint, for metadata of another format or without an entry that is needed.
        CheckpointError: for an unreadable checkpoint.
    """
    directory = checkpoint_directory(workdir)
    with Checkpoints(directory, keep=None) as checkpoints:
        meta = checkpoints.meta(step)
    name = f"checkpoint {directory / str(step)}: its metadata"
    config = valid_config(meta, name)
    index = stored_entry(meta, "stage", int, name)
    if not 0 <= index < len(config.stages):
        raise ConfigError(f"{name} has stage {index}, but its config has {len(config.stages)} stages, from 0")
    stage = config.schedule[index]
    seen = stored_entry(meta, "samples_seen", int, name) if "samples_seen" in meta else stage.samples_before(step)
    fingerprint = stored_entry(meta, "fingerprint", str, name)
    metrics = stored_entry(meta, "newest_metrics", dict, name) if "newest_metrics" in meta else {}  # older ones lack it
    losses = stored_entry(meta, "recent_losses", list, name) if "recent_losses" in meta else []
    return Position(
        step,
        stage,
        config,
        seen,
        fingerprint,
        {key: stored_entry(metrics, key, float, name) for key in metrics},
        _skipped(meta, name),
        tuple(math.nan if loss is None else float(loss) for loss in losses),
    )


def _skipped(meta: dict[str, Any], name: str) -> Ranges:
    """The skipped samples of a checkpoint's metadata; older ones have none."""
    ranges = stored_entry(meta, "skipped_samples", list, name) if "skipped_samples" in meta else []
    return parse_ranges(map(str, ranges), f"{name}: skipped_samples")
