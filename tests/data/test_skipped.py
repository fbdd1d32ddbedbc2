"""Samples that a run leaves out: the others are those of the stream, in its order and with their mixture."""

import dataclasses
import itertools

import numpy as np
import pytest

from flmjax.config import ConfigError, DataConfig, RunConfig
from flmjax.config.sample_ranges import (
    SampleRange,
    count_samples,
    join_ranges,
    parse_ranges,
    ranges_before,
    ranges_from,
)
from flmjax.config.validate import validate
from flmjax.data.loader import TrainingStream
from flmjax.data.mixture import MixturePhase, exact_phases
from flmjax.data.prepare import prepare
from flmjax.data.skipped import check_blocks, lengthened, samples_passed, stream_number
from flmjax.data.sources.documents import is_held_out

LENGTH = 8  # "0000123" and the end token: a row is a document, and its id can be read from it
FRACTION = 0.1


def ranges(*pairs: tuple[int, int]) -> tuple[SampleRange, ...]:
    return tuple(SampleRange(*pair) for pair in pairs)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TrainingStream:
    """Two sources of 200 training documents; the second has numbers from a million on. The mixture is 2 to 1."""
    sources: dict[str, list[str]] = {"x": [], "y": []}
    for texts, first in zip(sources.values(), (0, 1_000_000), strict=True):
        numbers = (f"{i:07d}" for i in itertools.count(first))
        while sum(not is_held_out(text.encode(), FRACTION) for text in texts) < 200:
            texts.append(next(numbers))
    data = DataConfig(sources=("x", "y"), vocabulary="bytes", validation_fraction=FRACTION)
    prepared = prepare(data, tmp_path_factory.mktemp("skipped") / "data", sources=sources)
    return TrainingStream(prepared, data, 0, LENGTH, (MixturePhase((2.0, 1.0), None),))


def document(row) -> int:
    return int(bytes(row[:7].astype(np.uint8)))


def read(stream: TrainingStream, start: int, count: int, hosts: int = 1, batch_size: int = 4) -> list[int]:
    """Documents of `count` samples in the order of the batches, from read number `start` on."""
    iterators = [stream.batches(start=start, batch_size=batch_size, host=h, hosts=hosts) for h in range(hosts)]
    batches = [next(iterator)["tokens"] for _ in range(count // batch_size) for iterator in iterators]
    for iterator in iterators:
        iterator.close()
    return [document(row) for batch in batches for row in batch]


def documents(stream: TrainingStream, samples) -> list[int]:
    return [document(stream.samples[n]["tokens"]) for n in samples]


# ---- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("5",), "'5' is no range of samples; write FIRST:END"),
        (("5:5",), "'5:5' is no range"),
        (("7:5",), "'7:5' is no range"),
        (("-1:5",), "'-1:5' is no range"),
        (("1:2:3",), "'1:2:3' is no range"),
        (("a:b",), "'a:b' is no range"),
        ((f"0:{2**60}",), "numbers of at most"),
        (("10:20", "15:30"), "10:20 and 15:30 overlap or are not in rising order"),
        (("30:40", "10:20"), "30:40 and 10:20 overlap or are not in rising order"),
    ],
)
def test_a_setting_that_is_no_list_of_ranges_is_refused(texts, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        validate(RunConfig(data=DataConfig(skip_samples=texts)))
    assert str(refusal.value).startswith("data.skip_samples: ")
    assert "\n" not in str(refusal.value)


def test_ranges_that_touch_are_one():
    assert parse_ranges(("0:3", "5:8", "8:9"), "x") == ranges((0, 3), (5, 9))
    assert join_ranges(ranges((5, 9), (0, 3), (2, 4), (4, 5), (20, 21))) == ranges((0, 9), (20, 21))
    assert validate(RunConfig(data=DataConfig(skip_samples="4:8"))).data.skip_samples == ("4:8",)


def test_ranges_are_cut_at_a_sample():
    skipped = ranges((2, 5), (8, 10))
    for sample in range(12):
        before, after = ranges_before(skipped, sample), ranges_from(skipped, sample)
        assert join_ranges((*before, *after)) == skipped
        assert count_samples(before) == sum(first <= n < end for first, end in skipped for n in range(sample))
        assert all(end <= sample for _, end in before)
        assert all(first >= sample for first, _ in after)


def test_a_read_number_counts_the_samples_that_are_not_skipped():
    skipped = ranges((0, 2), (5, 8), (9, 10))
    others = [n for n in range(100) if not any(first <= n < end for first, end in skipped)]
    assert [stream_number(skipped, n) for n in range(50)] == others[:50]
    assert [samples_passed(skipped, n) for n in range(1, 50)] == [n + 1 for n in others[:49]]
    assert samples_passed(skipped, 0) == 0


# ---- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hosts", "start"), [(1, 0), (2, 8), (4, 20)])
def test_the_other_samples_are_those_of_the_stream_in_order(stream, hosts, start):
    skipped = ranges((6, 11), (16, 40))
    others = [n for n in range(120) if not any(first <= n < end for first, end in skipped)]
    left_out = dataclasses.replace(stream, skipped=skipped)
    assert read(left_out, start, 40, hosts) == documents(stream, others[start : start + 40])


def test_a_skipped_range_lengthens_its_phase(stream):
    """Updates keep their mixture, and no sample of the range comes again."""
    two = (MixturePhase((1.0, 0.0), 12), MixturePhase((0.0, 1.0), None))
    x, y = (dataclasses.replace(stream, schedule=(MixturePhase(weights, None),)) for weights in ((1, 0), (0, 1)))
    # Samples 0 to 11 of the stream are of x and 12 to 15 of y; after the range 8 more of x follow, which updates read.
    across = dataclasses.replace(stream, schedule=two, skipped=ranges((4, 16)))
    assert read(across, 0, 20) == documents(x, [*range(4), *range(12, 20)]) + documents(y, range(4, 12))
    within = dataclasses.replace(stream, schedule=two, skipped=ranges((4, 8)))
    assert read(within, 0, 20) == documents(x, [*range(4), *range(8, 16)]) + documents(y, range(8))
    twice = dataclasses.replace(stream, schedule=two, skipped=ranges((0, 4), (8, 12)))
    assert read(twice, 0, 16) == documents(x, [*range(4, 8), *range(12, 20)]) + documents(y, range(4))


@pytest.mark.parametrize("skipped", [((3, 5), (12, 14)), ((0, 30),), ((8, 12),), ((9, 10), (11, 40), (41, 42)), ()])
def test_a_phase_has_as_many_read_samples_as_without_skips(skipped):
    schedule = [MixturePhase((1.0, 0.0), 10), MixturePhase((1.0, 1.0), 4), MixturePhase((0.0, 1.0), None)]
    phases = lengthened(schedule, ranges(*skipped))
    of_sample = [phase.mixture_weights for phase in phases for _ in range(phase.samples or 100)]
    numbers = [stream_number(ranges(*skipped), n) for n in range(30)]
    assert [of_sample[n] for n in numbers] == [(1.0, 0.0)] * 10 + [(1.0, 1.0)] * 4 + [(0.0, 1.0)] * 16


def test_the_fingerprint_has_the_skipped_samples(stream):
    skipped, other = (dataclasses.replace(stream, skipped=ranges((4, end))) for end in (8, 12))
    assert len({stream.fingerprint, skipped.fingerprint, other.fingerprint}) == 3


def test_blocks_of_text_and_teachers_stay_whole():
    phases = exact_phases((MixturePhase((1.0, 1.0), 16, 4), MixturePhase((1.0, 1.0), None, 6)), 2)
    check_blocks(phases, ranges((4, 12), (22, 34)))
    for wrong in ((2, 8), (4, 10), (20, 28)):
        with pytest.raises(ConfigError, match=r"a range must begin and end between batches, at (0|16) or a multiple"):
            check_blocks(phases, ranges(wrong))
    check_blocks(exact_phases((MixturePhase((1.0, 1.0), None),), 2), ranges((2, 7)))
