"""Ranges of sample numbers of the training stream, "FIRST:END" in settings: the samples FIRST to END - 1."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from flmjax.config.errors import ConfigError, shorten

MAX_SAMPLE = 2**50  # numbers of a stream; see data/mixture.py


class SampleRange(NamedTuple):
    """The samples `first` to `end` - 1 of the training stream, at least one."""

    first: int
    end: int

    def __str__(self) -> str:
        return f"{self.first}:{self.end}"


Ranges = tuple[SampleRange, ...]  # in rising order; no two overlap or touch


def parse_ranges(texts: Iterable[str], name: str) -> Ranges:
    """The ranges that a setting holds; neighbours that touch are joined.

    Args:
        texts: entries of the setting, each "FIRST:END".
        name: of the setting, for messages.

    Raises:
        ConfigError: for an entry of another form, an empty range, and ranges that overlap or do not rise.
    """
    ranges: list[SampleRange] = []
    for text in texts:
        first, colon, end = text.partition(":")
        is_pair = bool(colon) and all(part.isascii() and part.isdigit() and len(part) < 20 for part in (first, end))
        if not is_pair or not int(first) < int(end) <= MAX_SAMPLE:
            raise ConfigError(
                f"{name}: {shorten(text)} is no range of samples; write FIRST:END, such as 4096:8192 for the samples "
                f"4096 to 8191, with numbers of at most {MAX_SAMPLE}"
            )
        ranges.append(SampleRange(int(first), int(end)))
    for before, after in itertools.pairwise(ranges):
        if after.first < before.end:
            raise ConfigError(f"{name}: {before} and {after} overlap or are not in rising order")
    return join_ranges(ranges)


def join_ranges(ranges: Iterable[SampleRange]) -> Ranges:
    """The union of ranges in any order."""
    joined: list[SampleRange] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1].end:
            joined[-1] = SampleRange(joined[-1].first, max(joined[-1].end, end))
        else:
            joined.append(SampleRange(first, end))
    return tuple(joined)


def ranges_before(ranges: Ranges, sample: int) -> Ranges:
    """The parts of the ranges below sample number `sample`."""
    return tuple(SampleRange(first, min(end, sample)) for first, end in ranges if first < sample)


def ranges_from(ranges: Ranges, sample: int) -> Ranges:
    """The parts of the ranges from sample number `sample` on."""
    return tuple(SampleRange(max(first, sample), end) for first, end in ranges if end > sample)


def count_samples(ranges: Ranges) -> int:
    """Number of samples in the ranges."""
    return sum(end - first for first, end in ranges)
