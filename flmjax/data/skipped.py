"""Samples of the training stream that a run leaves out, such as those around a loss spike.

Samples have two numbers. The stream's number counts all samples; settings, records of roll-backs and checkpoints use
it. The read number counts the samples that updates get: sample n of them is the n-th sample of the stream that is not
skipped.

    skipped 2:5      read number             0 1       2 3 4
                     number in the stream    0 1 2 3 4 5 6 7

A skipped range lengthens the phase of the mixture that it lies in, so that updates keep their mixture: the phases up to
the end of the range are as if it were read, and from there on they are those from its first sample on.

    phases A A A A B B B ..., skipped 2:5    number in the stream    0 1 2 3 4 5 6 7
                                             phase                   A A A A B A A B ...
                                             read number             0 1       2 3 4 ...
"""

from collections.abc import Sequence

from flmjax.config import ConfigError
from flmjax.config.sample_ranges import Ranges
from flmjax.data.mixture import ExactPhase, MixturePhase


def stream_number(skipped: Ranges, n: int) -> int:
    """Number in the stream of the sample with read number `n`."""
    for first, end in skipped:
        if n < first:
            break
        n += end - first
    return n


def samples_passed(skipped: Ranges, n: int) -> int:
    """Number in the stream after the first `n` read samples; ranges that begin there are not passed yet."""
    return stream_number(skipped, n - 1) + 1 if n else 0


def lengthened(schedule: Sequence[MixturePhase], skipped: Ranges) -> list[MixturePhase]:
    """The phases of all samples of the stream.

    Args:
        schedule: phases of the samples that are read; the last has no end.
        skipped: samples that are not read.
    """
    phases = list(schedule)
    for first, end in skipped:
        phases = [*_until(phases, end), *_after(phases, first)]
    return phases


def phases_until(schedule: Sequence[MixturePhase], skipped: Ranges, sample: int) -> tuple[MixturePhase, ...]:
    """The phases of the first `sample` samples of the stream; the last goes on without end."""
    *phases, last = _until(lengthened(schedule, skipped), sample) or schedule[:1]
    return *phases, last._replace(samples=None)


def check_blocks(phases: Sequence[ExactPhase], skipped: Ranges) -> None:
    """Refuse ranges that begin or end within a block, for later batches would mix text and teachers.

    Args:
        phases: of all samples of the stream.

    Raises:
        ConfigError: naming the range and the samples of a block.
    """
    for skipped_range in skipped:
        for sample in skipped_range:
            start = 0
            for phase in phases:
                if phase.samples is None or sample < start + phase.samples:
                    break
                start += phase.samples
            if phase.block and (sample - start) % phase.block:
                raise ConfigError(
                    f"skipped samples {skipped_range}: with data.teacher_mixing='alternating' a range must begin and "
                    f"end between batches, at {start} or a multiple of {phase.block} samples after it"
                )


def _until(phases: Sequence[MixturePhase], sample: int) -> list[MixturePhase]:
    """The phases of the samples before number `sample`."""
    kept, start = [], 0
    for phase in phases:
        if start >= sample:
            break
        length = sample - start if phase.samples is None else min(phase.samples, sample - start)
        kept.append(phase._replace(samples=length))
        start += length
    return kept


def _after(phases: Sequence[MixturePhase], sample: int) -> list[MixturePhase]:
    """The phases of the samples from number `sample` on."""
    kept, start = [], 0
    for phase in phases:
        if phase.samples is None:
            kept.append(phase)
        elif start + phase.samples > sample:
            kept.append(phase._replace(samples=phase.samples - max(sample - start, 0)))
        start += phase.samples or 0
    return kept
