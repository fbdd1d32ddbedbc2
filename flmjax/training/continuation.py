"""How a run goes on from its newest checkpoint: which changes of its config and its data the past permits.

A config may change where no update that is already made would have been another: the model, the mixture and the
learning rate of every update up to the checkpoint must be those of the config that wrote it. Samples that the run has
not read yet may be skipped.
"""

import dataclasses
from pathlib import Path

import numpy as np

from flmjax.config import ConfigError, RunConfig, ScheduleSettings, StageConfig, differences
from flmjax.config.sample_ranges import join_ranges, parse_ranges, ranges_before, ranges_from
from flmjax.data.loader import TrainingStream
from flmjax.data.named_sources import with_portable_names
from flmjax.data.skipped import phases_until
from flmjax.optimizer.schedule import borders, learning_rate, new_warmup
from flmjax.workdir.position import Position
from flmjax.workdir.roll_backs import rolled_back_samples

SHOWN_FIELDS = 6  # of a refusal
LONGER = (
    "; a constant schedule, and wsd before its decay, can take more steps, a cosine or a decay that has begun cannot: "
    "add a further stage with growth.rate_policy='stage' in the config file"
)

# ---- the config ------------------------------------------------------------------------------------------------------


def check_continuation(workdir: Path, position: Position | None, config: RunConfig) -> None:
    """Refuse a config that does not continue the run in `workdir`; without a checkpoint every config does.

    Raises:
        ConfigError: with the fields that differ, and what is permitted.
    """
    if position is None:
        return
    check_skipped(workdir, position, config)
    past, config = (
        dataclasses.replace(settings, data=dataclasses.replace(with_portable_names(settings.data), skip_samples=()))
        for settings in (position.config, config)
    )
    if config.model.vocab_size is None:
        past = dataclasses.replace(past, model=dataclasses.replace(past.model, vocab_size=None))
    changed = differences(dataclasses.replace(past, stages=()), dataclasses.replace(config, stages=()))
    changed += _changed_stages(past, config, position)
    if changed:
        more = f" and {len(changed) - SHOWN_FIELDS} more" if len(changed) > SHOWN_FIELDS else ""
        raise ConfigError(
            f"{workdir} holds a run of another config: {'; '.join(changed[:SHOWN_FIELDS])}{more}; "
            f"take another --workdir (only steps from {position.step} on and later stages may change)"
        )
    _check_rates(workdir, past.stages, config.stages, position.step)
    _check_warmups(workdir, past, config, position.stage.index)


def _changed_stages(past: RunConfig, config: RunConfig, position: Position) -> list[str]:
    """Differences of the stages that have begun, but of the settings that decide learning rates alone."""
    last = position.stage.index
    if len(config.stages) <= last:
        return [f"stages: {len(past.stages)} -> {len(config.stages)}, but stages[{last}] has begun"]
    changed = []
    for i, (before, after) in enumerate(zip(past.stages[: last + 1], config.stages[: last + 1], strict=True)):
        of_rates = {name: getattr(before, name) for name in ScheduleSettings._fields}
        growth = dataclasses.replace(
            after.growth,
            rate_policy=before.growth.rate_policy,
            rewarm_fraction=before.growth.rewarm_fraction,
            new_warmup_fraction=before.growth.new_warmup_fraction,
        )
        if i == last and after.steps >= position.step - position.stage.start:
            of_rates["steps"] = before.steps
        changed += differences(before, dataclasses.replace(after, growth=growth, **of_rates), f"stages[{i}]")
    return changed


def _check_rates(workdir: Path, past: tuple[StageConfig, ...], present: tuple[StageConfig, ...], updates: int) -> None:
    """Refuse stages that give one of the first `updates` updates another learning rate than `past` gives.

    Schedules are constant, linear or cosines between a few borders: updates beside every border, and some between them,
    show each difference.
    """
    if past == present or not updates:
        return
    compared = {int(update) for update in np.linspace(0, updates - 1, 32)}
    for border in borders(past) | borders(present):
        compared |= {border - 1, border, border + 1}
    for update in sorted(compared & set(range(updates))):
        before, after = (np.float32(learning_rate(stages, update)) for stages in (past, present))  # as the step gets it
        if before != after:
            of_stages = [(f"stages[{i}]", *pair) for i, pair in enumerate(zip(past, present, strict=False))]
            changed = [line for path, a, b in of_stages for line in differences(a, b, path)]
            is_same_length = sum(s.steps for s in past) == sum(s.steps for s in present)
            if len(past) != len(present):
                changed.append(f"stages: {len(past)} -> {len(present)}")
            raise ConfigError(
                f"{workdir}: {'; '.join(changed[:SHOWN_FIELDS])} would change the learning rate of updates that are "
                f"made (update {update + 1}: {before:.6g} -> {after:.6g}); take another --workdir for them"
                f"{'' if is_same_length else LONGER}"
            )


def _check_warmups(workdir: Path, past: RunConfig, config: RunConfig, last: int) -> None:
    """Refuse another warm-up of the parameters that the growth into a stage up to number `last` created."""
    for before, after in zip(past.schedule[1 : last + 1], config.schedule[1 : last + 1], strict=True):
        old, new = new_warmup(before.config), new_warmup(after.config)
        assert before.previous is not None
        if before.model != before.previous.model and old != new:
            raise ConfigError(
                f"{workdir}: the parameters that stages[{before.index}] created have a warm-up of {old} updates, and "
                f"of {new} in this config; stages[{before.index}].growth.new_warmup_fraction="
                f"{old / after.config.steps:.9g} keeps it"
            )


# ---- the data --------------------------------------------------------------------------------------------------------


def shifted(stream: TrainingStream, samples: int) -> TrainingStream:
    """The stream of a run that begins at sample number `samples`: the first mixture lasts `samples` longer."""
    first, *others = stream.schedule
    if first.samples is not None:
        first = first._replace(samples=first.samples + samples)
    return dataclasses.replace(stream, schedule=(first, *others), skipped=ranges_from(stream.skipped, samples))


def is_same_past(a: TrainingStream, b: TrainingStream, samples: int) -> bool:
    """Whether the first `samples` samples of two streams are the same, skipped or not."""
    return _until(a, samples).fingerprint == _until(b, samples).fingerprint


def _until(stream: TrainingStream, samples: int) -> TrainingStream:
    """The stream without the phases of the mixture after its first `samples` samples, and with no sample skipped."""
    phases = phases_until(stream.schedule, stream.skipped, samples)
    return dataclasses.replace(stream, schedule=phases, skipped=())


def check_skipped(workdir: Path, position: Position, config: RunConfig) -> None:
    """Refuse a config that skips a sample which the run at `position` has read, or reads one that it has skipped.

    Raises:
        ConfigError: naming the first range of either kind.
    """
    ranges = [*parse_ranges(config.data.skip_samples, "data.skip_samples"), *rolled_back_samples(workdir)]
    first, seen = position.first_sample, position.samples_seen
    before = ranges_before(position.skipped, seen)
    now = ranges_before(ranges_from(join_ranges(ranges), first), seen)
    if before == now:
        return
    changed = [f"{r} was read" for r in now if r not in before] + [f"{r} was skipped" for r in before if r not in now]
    raise ConfigError(
        f"{workdir} has read the data up to sample {seen} (step {position.step}), and of the samples before it "
        f"{changed[0]}: data.skip_samples may change from sample {seen} on"
    )


def has_read(position: Position, stream: TrainingStream) -> bool:
    """Whether the samples that the run at `position` has passed, and the runs before it, are the first of `stream`."""
    if stream.fingerprint == position.fingerprint:
        return True
    try:  # the same data with another mixture, or other skipped samples, later
        past = TrainingStream.of_run(position.config, stream.prepared)
        past = shifted(dataclasses.replace(past, skipped=position.skipped), position.first_sample)
    except ConfigError:  # weights for other sources
        return False
    return past.fingerprint == position.fingerprint and is_same_past(past, stream, position.samples_seen)


def continued_stream(workdir: Path, position: Position | None, stream: TrainingStream) -> TrainingStream:
    """The stream of the run in `workdir`, whose samples up to the checkpoint are those that the run has read.

    Args:
        stream: of the run's config, as if it began at sample 0.

    Raises:
        ConfigError: for other data or another mixture.
    """
    if position is None:
        return stream
    stream = shifted(stream, position.first_sample)
    if not has_read(position, stream):
        raise ConfigError(
            f"{workdir}: the data or its mixture is not that of the checkpoint at step {position.step} "
            f"(fingerprint {stream.fingerprint[:12]}, there {position.fingerprint[:12]})"
        )
    return stream
