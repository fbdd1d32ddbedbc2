"""Mixture of sources: which source gives sample n of a run, and which of its samples.

After n samples of a phase, each source has supplied its share of n, rounded so that the counts add up to n. The
number of samples that a source supplied before sample n is the index of sample n in the source's endless stream.

    shares (2, 1)    sample of the run       0 1 2 3 4 5
                     source                  0 0 1 0 0 1
                     sample of the source    0 1 0 2 3 1
"""

import bisect
import fractions
import math
from collections.abc import Sequence
from typing import NamedTuple

import grain

from flmjax.config import ConfigError, DataConfig, RunConfig
from flmjax.data.prepared import Prepared

ENDLESS = 2**50  # samples of a stream; Grain divides lengths as floats, which hold this number exactly


class MixturePhase(NamedTuple):
    """Consecutive samples of a run that come from one mixture.

    Attributes:
        mixture_weights: relative numbers of samples, one for each source; they need not add up to 1. A source of
            weight 0 gives no sample.
        samples: number of samples of the phase. None: the phase has no end.
        block: 0 mixes text and teachers evenly; else they alternate in blocks of this many samples, a batch each.
    """

    mixture_weights: tuple[float, ...]
    samples: int | None
    block: int = 0


def default_mixture_weights(prepared: Prepared, data: DataConfig) -> tuple[float, ...]:
    """data.mixture_weights; if None, the rates of data.mixture; without a mixture, shares of the training tokens.

    Raises:
        ConfigError: if data.mixture_weights does not have one entry for each source.
    """
    if data.mixture_weights is not None:
        if len(data.mixture_weights) != len(prepared.sources):
            raise ConfigError(
                f"data.mixture_weights has {len(data.mixture_weights)} entries for the {len(prepared.sources)} "
                f"sources of the mixture: {', '.join(prepared.sources)}"
            )
        return data.mixture_weights
    if prepared.rates is not None:
        return prepared.rates
    tokens = [prepared.num_tokens(source, "train") for source in prepared.sources]
    return tuple(count / sum(tokens) for count in tokens)


def mixture_schedule(config: RunConfig, prepared: Prepared) -> tuple[MixturePhase, ...]:
    """One phase for each stage of the run; the last has no end."""
    weights = default_mixture_weights(prepared, config.data)
    alternating = config.data.teacher_mixing == "alternating" and prepared.marks is not None
    schedule = []
    for stage in config.schedule:
        batch_size = stage.config.batch_size
        weights = stage.config.mixture_weights or weights
        samples = (stage.end - stage.start + stage.tuning_steps) * batch_size
        is_last = stage.index + 1 == len(config.schedule)
        schedule.append(MixturePhase(weights, None if is_last else samples, batch_size if alternating else 0))
    return tuple(schedule)


Shares = tuple[int, ...]  # mixture weights of the sources as integers in lowest terms


class ExactPhase(NamedTuple):
    """A MixturePhase with integer shares."""

    shares: Shares
    samples: int | None
    block: int


def exact_phases(schedule: Sequence[MixturePhase], num_sources: int) -> list[ExactPhase]:
    """The phases with integer shares: empty ones left out, equal neighbours joined, the last without end.

    Raises:
        ConfigError: for a schedule without phases, for mixture weights that are negative, all 0 or not one for each
            source, and for a phase before the last without a number of samples.
    """
    phases: list[ExactPhase] = []
    for i, (weights, samples, block) in enumerate(schedule):
        valid = all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights)
        if len(weights) != num_sources or not valid:
            raise ConfigError(
                f"phase {i} of the mixture: the weights {weights} must be {num_sources} numbers, one for each source: "
                "positive, or 0 for a source that is not read"
            )
        is_last = i == len(schedule) - 1
        if not is_last and (samples is None or samples < 0):
            raise ConfigError(f"schedule[{i}]: samples={samples}; only the last phase has no end")
        if samples == 0 and not is_last:
            continue
        shares = _lowest_terms(weights)
        if phases and (phases[-1].shares, phases[-1].block) == (shares, block):
            before = phases.pop().samples or 0
            samples = None if samples is None else before + samples
        phases.append(ExactPhase(shares, samples, block))
    if not phases:
        raise ConfigError("the mixture schedule is empty")
    return [*phases[:-1], phases[-1]._replace(samples=None)]


def _lowest_terms(weights: Sequence[float]) -> Shares:
    ratios = [fractions.Fraction(str(weight)) for weight in weights]  # of the decimal digits: 0.535 is 107/200
    denominator = math.lcm(*(ratio.denominator for ratio in ratios))
    counts = [int(ratio * denominator) for ratio in ratios]
    return tuple(count // math.gcd(*counts) for count in counts)


def counts_after(shares: Shares, n: int) -> list[int]:
    """Number of samples that each source gives among the first n of a phase.

    Each source takes its share, rounded up, of the samples that the sources before it left. From n to n + 1 exactly one
    count rises, never that of a source whose share is 0.
    """
    counts = []
    samples_left, shares_left = n, sum(shares)
    for share in shares:
        others = samples_left * (shares_left - share) // max(shares_left, 1)  # shares are left as long as samples are
        counts.append(samples_left - others)
        samples_left, shares_left = others, shares_left - share
    return counts


def alternating_counts_after(shares: Shares, is_teacher: Sequence[bool], block: int, n: int) -> list[int]:
    """`counts_after` if blocks of samples are all text or all teachers'; the blocks of each kind are mixed evenly."""
    kinds = [[i for i, teacher in enumerate(is_teacher) if teacher is kind] for kind in (False, True)]
    shares_of_kinds = tuple(sum(shares[i] for i in kind) for kind in kinds)
    blocks, samples_of_last = divmod(n, block)
    complete, begun = counts_after(shares_of_kinds, blocks), counts_after(shares_of_kinds, blocks + 1)
    counts = [0] * len(shares)
    for kind, before, after in zip(kinds, complete, begun, strict=True):
        samples = before * block + (after - before) * samples_of_last
        counts_of_kind = counts_after(tuple(shares[i] for i in kind), samples)
        for i, count in zip(kind, counts_of_kind, strict=True):
            counts[i] = count
    return counts


class SampleOrder(grain.transforms.DatasetSelectionMap):
    """Sample n of the run -> (source, index in the endless stream of that source)."""

    def __init__(self, phases: Sequence[ExactPhase], is_teacher: Sequence[bool]):
        self._phases = phases
        self._is_teacher = is_teacher
        self._starts = [0]  # first sample of each phase
        self._cursors = [[0] * len(is_teacher)]  # for each phase, the samples that each source gave before it
        for i, phase in enumerate(phases[:-1]):
            assert phase.samples is not None
            self._starts.append(self._starts[-1] + phase.samples)
            counts = self._counts_after(i, phase.samples)
            self._cursors.append([cursor + count for cursor, count in zip(self._cursors[-1], counts, strict=True)])

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        phase = bisect.bisect_right(self._starts, index) - 1
        n = index - self._starts[phase]
        before, after = self._counts_after(phase, n), self._counts_after(phase, n + 1)
        source = next(i for i in range(len(before)) if after[i] > before[i])
        return source, self._cursors[phase][source] + before[source]

    def counts_before(self, index: int) -> list[int]:
        """Number of samples that each source gives before sample `index` of the run."""
        phase = bisect.bisect_right(self._starts, index) - 1
        counts = self._counts_after(phase, index - self._starts[phase])
        return [cursor + count for cursor, count in zip(self._cursors[phase], counts, strict=True)]

    def _counts_after(self, phase: int, n: int) -> list[int]:
        shares, _, block = self._phases[phase]
        if block:
            return alternating_counts_after(shares, self._is_teacher, block, n)
        return counts_after(shares, n)
