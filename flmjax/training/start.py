"""Start of a run, or its continuation by the same call: checks, locks and data, before loop.py trains."""

import functools
from pathlib import Path

import jax

from flmjax.config import ConfigError, RunConfig
from flmjax.config.validate import validate, validate_meshes
from flmjax.data.held_out import mixtures_of
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import META_FILE, with_vocabulary
from flmjax.data.prepared_folder import discard
from flmjax.evaluation.generate import prompt_ids
from flmjax.model.attention import check_backends
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.processes import is_writer
from flmjax.training.continuation import check_continuation, continued_stream
from flmjax.training.loop import Run
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import MetricsWriter, read_metrics
from flmjax.workdir.paths import (
    data_directory,
    latest_whole_step,
    locked_workdir,
    remove_certificates,
    stored_config,
    write_config,
)
from flmjax.workdir.position import Position, newest_position
from flmjax.workdir.progress import ProgressBar
from flmjax.workdir.starts import StartEntry


def train(config: RunConfig, workdir: Path) -> None:
    """Run the schedule in `workdir` to its end, from the newest checkpoint there if it has one.

    Raises:
        ConfigError: for a setting, a source or a workdir that does not fit.
        CheckpointError: for a checkpoint that cannot be read or written.
        GrowthError: for a growth that does not keep its claim.
        TrainingError: after too many skipped updates in a row.
    """
    validate(config)
    shapes = validate_meshes(config, jax.device_count())
    meshes = [make_mesh(shape, jax.devices()) for shape in shapes]
    check_backends(config, jax.devices()[0].platform)
    with locked_workdir(workdir), StartEntry(workdir) as entry, ProgressBar(config.total_steps) as bar:
        with bar.doing("loading"):
            stored, position = stored_config(workdir), newest_position(workdir)
            check_continuation(workdir, position, config)
            step = position.step if position is not None else 0
            bar.resume(step)
        if step == config.total_steps and not missing_samples(config, workdir, step):
            bar.log(f"finished at step {step:,}, nothing left to do")
            return
        doing = "loading the data" if is_prepared(config, workdir) else "preparing the data"
        with bar.doing(doing), entry.time.during("data preparation"):
            user_config, (config, stream) = config, open_stream(config, workdir, position)
        claim = functools.partial(write_config, user_config, workdir) if stored != user_config else lambda: None
        try:
            with (
                Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
                MetricsWriter(workdir, step) as writer,
            ):
                if is_writer():
                    remove_certificates(workdir, step)
                run = Run(config, workdir, stream, meshes, checkpoints, writer, bar, entry, position, claim)
                run.run_schedule()
        except KeyboardInterrupt:
            saved = latest_whole_step(workdir / "checkpoints")
            on_disk = "no step is on disk yet" if saved is None else f"step {saved:,} is on disk"
            raise KeyboardInterrupt(f"stopped at step {bar.step:,}; {on_disk}") from None


def is_prepared(config: RunConfig, workdir: Path) -> bool:
    """Whether the run's token files exist."""
    return (data_directory(config, workdir) / META_FILE).exists()


def open_stream(config: RunConfig, workdir: Path, position: Position | None) -> tuple[RunConfig, TrainingStream]:
    """The config with the vocabulary of its data, and the training stream, checked to fill batches and validation.

    Data that this call prepared in the workdir and that are too small are removed: they would refuse the corrected
    command, which has other sources.
    """
    is_new = not is_prepared(config, workdir) and config.data.directory is None
    data = prepare(config.data, data_directory(config, workdir), mixtures=mixtures_of(config), progress=True)
    config = with_vocabulary(config, data)
    try:
        stream = TrainingStream.of_run(config, data)
        for stage in config.schedule:
            stream.check_size(stage.config.batch_size)
        stream.validation_rows(1)
    except ConfigError:
        if is_new:
            discard(data.directory)
        raise
    if config.sample_tokens:
        prompt_ids(config.sample_prompt, data.tokenizer, config.model.max_length)  # refuses one that is too long
    return config, continued_stream(workdir, position, stream)


def missing_samples(config: RunConfig, workdir: Path, step: int) -> bool:
    """Whether an interrupt prevented the text sample of the stage that ended at `step`."""
    written = {(line["kind"], line["step"]) for line in read_metrics(workdir)}
    return config.sample_tokens > 0 and ("sample", step) not in written
