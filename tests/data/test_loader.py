"""The stream of samples: every row once an epoch, the same for all batch sizes, hosts and restarts."""

import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flmjax.config import ConfigError, DataConfig
from flmjax.data import loader
from flmjax.data.loader import Segment, batches, check_size, default_weights, fingerprint, mixture, validation_rows
from flmjax.data.prepare import prepare
from flmjax.data.prepared import load
from flmjax.data.sources.documents import is_held_out

LENGTH = 8  # "0000123" and the end token: a row is a document, and its id can be read from it
ONE = [Segment((1.0,), None)]
FRACTION = 0.1


def tagged(num_train: int, first: int = 0):
    """Documents of 7 digits from `first` on, until so many of them are training documents."""
    for i in itertools.count(first):
        if num_train == 0:
            return
        text = f"{i:07d}"
        num_train -= not is_held_out(text.encode(), FRACTION)
        yield text


def make(directory, **rows: int):
    """Prepared sources with so many training rows; ids of the k-th source start at k million."""
    data = DataConfig(sources=tuple(rows), vocabulary="bytes", validation_fraction=FRACTION)
    sources = {name: tagged(n, k * 1_000_000) for k, (name, n) in enumerate(rows.items())}
    return prepare(data, directory, sources=sources), data


def ids(batch) -> list[int]:
    return [int(bytes(row[:7].astype(np.uint8))) for row in batch["tokens"]]


def sample_ids(dataset, start: int, stop: int) -> list[int]:
    return [int(bytes(dataset[n]["tokens"][:7].astype(np.uint8))) for n in range(start, stop)]


def global_ids(dataset, start: int, steps: int, batch_size: int, hosts: int = 1, **options) -> list[int]:
    """Ids in the order of global batches, gathered from all hosts' iterators."""
    iterators = [
        batches(dataset, start=start, batch_size=batch_size, host=h, hosts=hosts, **options) for h in range(hosts)
    ]
    gathered = [i for _ in range(steps) for iterator in iterators for i in ids(next(iterator))]
    for iterator in iterators:
        iterator.close()
    return gathered


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return make(tmp_path_factory.mktemp("one") / "data", x=1024)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return make(tmp_path_factory.mktemp("two") / "data", x=1500, y=500)


def stream(made, schedule=ONE, seed=0, length=LENGTH):
    prepared, data = made
    return mixture(prepared, data, seed=seed, length=length, schedule=schedule)


def test_batches_have_the_rows_of_the_samples_in_order(one):
    dataset = stream(one)
    batch = next(batches(dataset, start=5, batch_size=4))
    assert sorted(batch) == ["targets", "tokens", "weights"]
    for key, array in batch.items():
        assert array.shape == (4, LENGTH)
        np.testing.assert_array_equal(array, np.stack([dataset[n][key] for n in range(5, 9)]))


def test_document_attention_reaches_the_rows(one):
    prepared, data = one
    cut = DataConfig(**{**vars(data), "document_attention": True})
    batch = next(batches(mixture(prepared, cut, seed=0, length=20, schedule=ONE), start=0, batch_size=2))
    assert batch["segment_ids"].max() >= 3  # 20 tokens of documents of 8
    assert batch["positions"].max() <= 7


def test_a01_a_killed_and_resumed_run_sees_the_same_samples(one):
    straight = global_ids(stream(one), 0, 30, 4)
    before = global_ids(stream(one), 0, 11, 4)
    reopened = (load(one[0].directory), one[1])
    assert before + global_ids(stream(reopened), 11 * 4, 19, 4) == straight


@pytest.mark.parametrize(("hosts", "prefetch", "batch_size"), [(1, 1, 4), (1, 16, 16), (4, 1, 16), (4, 16, 4)])
def test_a02_a_stop_anywhere_repeats_nothing_and_loses_nothing(one, hosts, prefetch, batch_size):
    dataset = stream(one)
    straight = sample_ids(dataset, 0, 96)
    assert len(set(straight)) == 96
    for start in range(1, 65):
        options = {"threads": 1, "prefetch": prefetch}
        before = global_ids(dataset, 0, start, 1, **options)  # its buffer of later samples is thrown away
        after = global_ids(dataset, start, -(-(96 - start) // batch_size), batch_size, hosts, **options)
        assert before + after[: 96 - start] == straight


def test_a03_four_hosts_then_two_then_eight_are_one_stream(one):
    dataset = stream(one)
    whole = global_ids(dataset, 0, 15, 16, hosts=4)
    parts = [global_ids(dataset, 16 * 5 * i, 5, 16, hosts=hosts) for i, hosts in enumerate((4, 2, 8))]
    assert [i for part in parts for i in part] == whole
    assert global_ids(dataset, 0, 20, 12, hosts=3) == whole  # also with another batch size: 240 samples


def test_threads_and_buffers_do_not_matter(one):
    dataset = stream(one)
    expected = sample_ids(dataset, 0, 160)
    for threads, prefetch in ((0, 0), (1, 1), (2, 8), (4, 2)):
        assert global_ids(dataset, 0, 20, 8, threads=threads, prefetch=prefetch) == expected


def test_a04_each_source_goes_on_at_its_own_cursor_when_the_mixture_changes(two):
    changed = sample_ids(stream(two, [Segment((1.0, 1.0), 50), Segment((2.0, 1.0), None)]), 0, 200)
    even = sample_ids(stream(two, [Segment((1.0, 1.0), None)]), 0, 400)
    for low, high in ((0, 1_000_000), (1_000_000, 2_000_000)):
        own = [i for i in changed if low <= i < high]
        assert own == [i for i in even if low <= i < high][: len(own)]  # consecutive in the source's own order
        assert len(set(own)) == len(own)
    assert sum(i < 1_000_000 for i in changed[:50]) == 25
    assert sum(i < 1_000_000 for i in changed[50:]) == 100


def test_shares_are_exact_at_every_moment(two):
    dataset = stream(two, [Segment((0.535, 0.465), None)])
    first = np.cumsum([i < 1_000_000 for i in sample_ids(dataset, 0, 2000)])
    assert np.abs(first - 0.535 * np.arange(1, 2001)).max() <= 1
    assert first[999] == 535


def test_three_sources_stay_within_their_number_of_the_exact_share(tmp_path):
    made = make(tmp_path / "data", x=500, y=500, z=500)
    weights = np.array([0.7, 0.1, 0.2])
    seen = np.array(sample_ids(stream(made, [Segment(tuple(weights), None)]), 0, 1000)) // 1_000_000
    counts = np.cumsum(np.eye(3)[seen], axis=0)
    assert np.abs(counts - np.arange(1, 1001)[:, None] * weights).max() < 3


def test_default_weights_are_shares_of_training_tokens(two):
    prepared, data = two
    assert default_weights(prepared, data) == pytest.approx((0.75, 0.25))
    assert default_weights(prepared, DataConfig(**{**vars(data), "mixture_weights": (1.0, 9.0)})) == (1.0, 9.0)


def test_a05_resuming_late_reads_no_more_than_a_few_batches(two, monkeypatch):
    reads = []
    real = loader.make_row
    monkeypatch.setattr(loader, "make_row", lambda *args, **kw: reads.append(args[2]) or real(*args, **kw))
    for start in (1_000_000, 1_000_000_000):
        reads.clear()
        begin = time.monotonic()
        dataset = stream(two, [Segment((1.0, 2.0), 999_999), Segment((2.0, 1.0), None)])
        iterator = batches(dataset, start=start, batch_size=8, prefetch=4)
        next(iterator)
        assert time.monotonic() - begin < 2
        assert len(reads) <= 8 * (4 + 2)
        iterator.close()


def test_a06_one_file_of_forty_rows_over_four_hosts_is_disjoint_and_complete(tmp_path):
    dataset = stream(make(tmp_path / "data", x=40))
    own = [global_ids_of_host(dataset, host) for host in range(4)]
    assert [len(part) for part in own] == [10] * 4
    assert len(set().union(*own)) == 40


def global_ids_of_host(dataset, host):
    iterator = batches(dataset, start=0, batch_size=8, host=host, hosts=4)
    return [i for _ in range(5) for i in ids(next(iterator))]


def test_a07_fewer_rows_than_a_batch_are_refused_with_both_numbers(tmp_path):
    prepared, data = make(tmp_path / "data", x=5)
    with pytest.raises(ConfigError, match=r"5 rows of 8 tokens, fewer than one batch of 8.*lower batch_size"):
        check_size(prepared, data, LENGTH, 8)
    check_size(prepared, data, LENGTH, 5)


def test_a07_hosts_of_an_uneven_epoch_go_on_together(tmp_path):
    dataset = stream(make(tmp_path / "data", x=41))
    seen = global_ids(dataset, 0, 3 * 41, 4, hosts=2)  # 12 epochs; a host never ends before another
    assert all(seen.count(i) == 12 for i in set(seen))


def test_a22_three_epochs_are_three_complete_permutations_and_the_same_in_each_run(tmp_path):
    made = make(tmp_path / "data", x=64)
    first = sample_ids(stream(made), 0, 192)
    assert first == sample_ids(stream((load(made[0].directory), made[1])), 0, 192)
    epochs = [first[64 * i : 64 * (i + 1)] for i in range(3)]
    assert all(len(set(epoch)) == 64 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sorted(epochs[0]) not in epochs


def test_another_seed_is_another_order(one):
    assert sample_ids(stream(one, seed=1), 0, 9) != sample_ids(stream(one, seed=0), 0, 9)


def test_where_stages_begin_does_not_matter_while_the_mixture_stays(two):
    prepared, data = two
    whole = [Segment((0.3, 0.7), None)]
    cut = [Segment((0.3, 0.7), 7), Segment((0.3, 0.7), 0), Segment((0.3, 0.7), 31)]
    assert sample_ids(stream(two, cut), 0, 100) == sample_ids(stream(two, whole), 0, 100)
    prints = [fingerprint(prepared, data, seed=0, length=8, schedule=schedule) for schedule in (cut, whole)]
    assert prints[0] == prints[1]


def test_an_empty_segment_between_two_stretches_is_none(two):
    prepared, data = two
    with_empty = [Segment((1.0, 3.0), 10), Segment((1.0, 1.0), 0), Segment((1.0, 3.0), None)]
    without = [Segment((1.0, 3.0), None)]
    assert sample_ids(stream(two, with_empty), 0, 40) == sample_ids(stream(two, without), 0, 40)
    prints = [fingerprint(prepared, data, seed=0, length=8, schedule=schedule) for schedule in (with_empty, without)]
    assert prints[0] == prints[1]


def test_fingerprint_changes_with_all_that_decides_the_stream(two, tmp_path):
    prepared, data = two
    base = {"seed": 0, "length": 8, "schedule": [Segment((1.0, 1.0), 10), Segment((2.0, 1.0), None)]}
    other_text, _ = make(tmp_path / "data", x=1500, y=501)
    variants = [
        fingerprint(prepared, data, **base),
        fingerprint(prepared, data, **{**base, "seed": 1}),
        fingerprint(prepared, data, **{**base, "length": 16}),
        fingerprint(prepared, data, **{**base, "schedule": [Segment((1.0, 1.0), 11), Segment((2.0, 1.0), None)]}),
        fingerprint(prepared, data, **{**base, "schedule": [Segment((1.0, 1.0), 10), Segment((2.1, 1.0), None)]}),
        fingerprint(prepared, DataConfig(**{**vars(data), "document_attention": True}), **base),
        fingerprint(other_text, data, **base),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint(load(prepared.directory), data, **base) == variants[0]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "schedule is empty"),
        ([Segment((1.0,), None)], r"schedule\[0\]: weights .* must be 2 positive numbers"),
        ([Segment((1.0, 0.0), None)], r"schedule\[0\]: weights"),
        ([Segment((1.0, float("nan")), None)], r"schedule\[0\]: weights"),
        ([Segment((1.0, 1.0), None), Segment((1.0, 2.0), None)], r"schedule\[0\]: samples=None; only the last"),
    ],
)
def test_schedules_that_cannot_be_are_refused(two, schedule, message):
    with pytest.raises(ConfigError, match=message):
        stream(two, schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "hosts": 4}, "batch_size=6 does not divide over 4 data hosts"),
        ({"batch_size": 8, "hosts": 2, "host": 2}, "host=2 is not one of 2"),
        ({"batch_size": 8, "start": -1}, "start=-1"),
    ],
)
def test_batches_that_cannot_be_are_refused_at_once(one, options, message):
    with pytest.raises(ConfigError, match=message):
        batches(stream(one), **{"start": 0, **options})


def test_a_source_without_a_row_is_named(tmp_path):
    data = DataConfig(sources=("x", "y"), vocabulary="bytes", validation_fraction=FRACTION, end_of_document=False)
    letter = next(c for c in "abcdefghijklmnop" if not is_held_out(c.encode(), FRACTION))
    prepared = prepare(data, tmp_path / "data", sources={"x": tagged(50), "y": [letter]})
    with pytest.raises(ConfigError, match="'y' has no training row"):
        check_size(prepared, data, LENGTH, 4)


def test_validation_rows_are_held_out_full_first_and_spread_over_the_sources(two):
    prepared, data = two
    counts = [prepared.meta["sources"][s]["validation"]["documents"] for s in ("x", "y")]
    some = validation_rows(prepared, data, length=LENGTH, rows=12)
    assert some["tokens"].shape == (12, LENGTH)
    assert some["weights"].min() == 1
    share = sum(i < 1_000_000 for i in ids(some)) / 12
    assert share == pytest.approx(counts[0] / sum(counts), abs=0.1)
    assert len(set(ids(some))) == 12
    training = {i for s in ("x", "y") for i in ids({"tokens": prepared.tokens(s, "train").reshape(-1, LENGTH)})}
    assert len(training) == 2000
    everything = validation_rows(prepared, data, length=LENGTH, rows=1000)
    assert len(everything["tokens"]) == sum(counts)  # the two last rows, padded, come too
    assert everything["weights"].sum() == sum(counts) * LENGTH - 2
    assert training.isdisjoint(ids(everything))
    assert set(ids(some)) <= set(ids(everything))


def test_validation_shorter_than_a_row_is_one_padded_row(two):
    prepared, data = two
    rows = validation_rows(prepared, data, length=100_000, rows=5)
    assert rows["tokens"].shape == (2, 100_000)
    expected = sum(prepared.num_tokens(s, "validation") - 1 for s in ("x", "y"))
    assert rows["weights"].sum() == expected


def test_closing_or_dropping_the_iterator_ends_its_threads(one):
    def workers():
        return [t for t in threading.enumerate() if "grain-prefetch" in t.name]

    before = len(workers())
    closed = batches(stream(one), start=0, batch_size=4, threads=2)
    dropped = batches(stream(one), start=0, batch_size=4, threads=2)
    next(closed), next(dropped)
    assert len(workers()) > before
    closed.close()
    del dropped
    deadline = time.monotonic() + 10
    while len(workers()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers()) == before


def test_the_interpreter_ends_with_an_iterator_still_open(one):
    code = """
import sys
from pathlib import Path
from flmjax.config import DataConfig
from flmjax.data import loader, prepared
opened = prepared.load(Path(sys.argv[1]))
schedule = [loader.Segment((1.0,), None)]
dataset = loader.mixture(opened, DataConfig(sources=("x",)), seed=0, length=8, schedule=schedule)
iterator = loader.batches(dataset, start=0, batch_size=4, threads=3, prefetch=6)
print(next(iterator)["tokens"].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, one[0].directory], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "(4, 8)\n"
    assert "Traceback" not in done.stderr
