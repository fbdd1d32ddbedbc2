"""Where a run stands: the metadata of one of its checkpoints."""

from pathlib import Path
from typing import NamedTuple

from flmjax.config import ConfigError, RunConfig, Stage, stored_entry
from flmjax.workdir.checkpoint import CheckpointError, Checkpoints
from flmjax.workdir.paths import is_complete, latest_whole_step, valid_config


class Position(NamedTuple):
    """Where a run stands: the metadata of a checkpoint.

    Attributes:
        step: updates of the run.
        stage: the stage of the checkpoint, in the schedule of `config`.
        config: of the process that wrote the checkpoint, with the vocabulary's size.
        samples_seen: number of the next sample of the training stream.
        fingerprint: of the training stream.
        newest_metrics: values of the teachers and the text that no line of metrics has yet.
    """

    step: int
    stage: Stage
    config: RunConfig
    samples_seen: int
    fingerprint: str
    newest_metrics: dict[str, float]

    @property
    def first_sample(self) -> int:
        """Samples that the runs before this one read, from which it was grown."""
        return self.samples_seen - self.stage.samples_before(self.step)


def newest_position(workdir: Path) -> Position | None:
    """Position of the run in `workdir`; None without a complete checkpoint.

    Raises:
        ConfigError, CheckpointError: as position_at.
    """
    step = latest_whole_step(workdir / "checkpoints")
    if step is None:
        return None
    try:
        return position_at(workdir, step)
    except CheckpointError:
        if is_complete(workdir / "checkpoints" / str(step)):
            raise
        return newest_position(workdir)  # the run is in training and has deleted this checkpoint since


def position_at(workdir: Path, step: int) -> Position:
    """Position of the run in `workdir` at the checkpoint of `step`.

    Raises:
        ConfigError: naming the checkpoint, for metadata of another format or without an entry that is needed.
        CheckpointError: for an unreadable checkpoint.
    """
    directory = workdir / "checkpoints"
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
    return Position(
        step, stage, config, seen, fingerprint, {key: stored_entry(metrics, key, float, name) for key in metrics}
    )
