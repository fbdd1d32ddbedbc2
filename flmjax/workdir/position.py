"""Where a run stands: the metadata of one of its checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from flmjax.config import ConfigError, RunConfig, Stage, from_stored
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.paths import latest_whole_step

T = TypeVar("T")


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
    return None if step is None else position_at(workdir, step)


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
    config = from_stored(meta, name)
    index = _entry(meta, "stage", int, name)
    if not 0 <= index < len(config.stages):
        raise ConfigError(f"{name} has stage {index}, but its config has {len(config.stages)} stages, from 0")
    stage = config.schedule[index]
    seen = _entry(meta, "samples_seen", int, name) if "samples_seen" in meta else stage.samples_before(step)
    fingerprint = _entry(meta, "fingerprint", str, name)
    return Position(step, stage, config, seen, fingerprint, meta.get("newest_metrics", {}))  # older ones have none


def _entry(meta: Mapping[str, object], key: str, kind: type[T], name: str) -> T:
    value = meta.get(key)
    if not isinstance(value, kind):
        raise ConfigError(f"{name} has no '{key}'" if value is None else f"{name} has {key}={value!r}")
    return value
