"""A trace of some updates, WORKDIR/profile: what every device and the host did, for xprof and TensorBoard."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from flmjax.config import ConfigError, RunConfig, Stage
from flmjax.sharding.processes import is_writer
from flmjax.training.step import Update

PROFILE_FOLDER = "profile"


def check_window(config: RunConfig, window: range) -> None:
    """Refuse a window of updates that is not within one stage: a trace is of one program.

    Args:
        window: range(START, START + STEPS) for the updates START + 1 to START + STEPS of the run.

    Raises:
        ConfigError: naming the stage, or the steps of the run.
    """
    flag = f"--profile={window.start}:{len(window)}"
    stage = config.stage_at(window.start + 1)
    if window.start >= config.total_steps:
        raise ConfigError(f"{flag}: the run has {config.total_steps:,} updates; START must be below that")
    if window.stop > stage.end:
        raise ConfigError(
            f"{flag} goes beyond update {stage.end:,}, the last one of stage {stage.name}; take at most "
            f"{window.start}:{stage.end - window.start}"
        )


def traced(
    updates: Iterator[Update], step: int, stage: Stage, window: range, folder: Path, log: Callable[[str], None]
) -> Iterator[Update]:
    """The updates of a stage; those of the window are traced, by process 0 and with its devices.

    A run that goes on within the window has a trace of the rest. The devices have completed the updates before the
    window when the trace starts, and those of the window when it ends. The first update of a process compiles.

    Args:
        step: updates of the run before the first of `updates`.
        window: as for check_window.
        folder: gets plugins/profile/DATE/HOST.xplane.pb.
        log: prints a line.
    """
    if window.start not in range(stage.start, stage.end) or not is_writer():
        return updates
    return _traced(updates, step, window, folder, log)


def _traced(
    updates: Iterator[Update], step: int, window: range, folder: Path, log: Callable[[str], None]
) -> Iterator[Update]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would fill the trace, and slow the updates
    update: Update | None = None
    is_tracing = False
    try:
        while True:
            if step in window and not is_tracing:
                if update is not None:
                    jax.block_until_ready(update[2])
                jax.profiler.start_trace(folder, profiler_options=options)
                is_tracing = True
            mark = jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
            with mark if is_tracing else contextlib.nullcontext():
                update = next(updates, None)
            if update is None:
                return
            step = update[0]
            if is_tracing and step == window.stop:
                jax.block_until_ready(update[2])
                is_tracing = False
                jax.profiler.stop_trace()
                log(f"trace of updates {window.start + 1:,} to {window.stop:,}: xprof or tensorboard --logdir={folder}")
            yield update
    finally:
        if is_tracing:
            jax.profiler.stop_trace()
