"""The stream of samples: every row once an epoch, the same for all batch sizes, hosts and restarts."""

import dataclasses
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flmjax.config import ConfigError, DataConfig
from flmjax.data import loader
from flmjax.data.loader import TrainingStream
from flmjax.data.mixture import MixturePhase, SampleOrder, default_mixture_weights, exact_phases
from flmjax.data.prepare import prepare
from flmjax.data.prepared import load
from flmjax.data.sources.documents import is_held_out

LENGTH = 8  # "0000123" and the end token: a row is a document, and its id can be read from it
ONE_SOURCE = (MixturePhase((1.0,), None),)
FRACTION = 0.1


def numbered(num_train: int, first: int = 0):
    """Documents of 7 digits from `first` on, until so many of them are training documents."""
    for i in itertools.count(first):
        if num_train == 0:
            return
        text = f"{i:07d}"
        num_train -= not is_held_out(text.encode(), FRACTION)
        yield text


def make_stream(directory, schedule=ONE_SOURCE, **rows: int) -> TrainingStream:
    """Sources with so many training rows; ids of the k-th source start at k million."""
    data = DataConfig(sources=tuple(rows), vocabulary="bytes", validation_fraction=FRACTION)
    sources = {name: numbered(n, k * 1_000_000) for k, (name, n) in enumerate(rows.items())}
    return TrainingStream(prepare(data, directory, sources=sources), data, 0, LENGTH, tuple(schedule))


def reopened(stream: TrainingStream) -> TrainingStream:
    return replace(stream, prepared=load(stream.prepared.directory))


def replace(stream: TrainingStream, **fields) -> TrainingStream:
    return dataclasses.replace(stream, **fields)


def phases(*settings) -> tuple[MixturePhase, ...]:
    return tuple(MixturePhase(*phase) for phase in settings)


def ids(batch) -> list[int]:
    return [int(bytes(row[:7].astype(np.uint8))) for row in batch["tokens"]]


def sample_ids(stream: TrainingStream, start: int, stop: int) -> list[int]:
    return [int(bytes(stream.samples[n]["tokens"][:7].astype(np.uint8))) for n in range(start, stop)]


def global_ids(stream: TrainingStream, start: int, steps: int, batch_size: int, hosts: int = 1, **options) -> list[int]:
    """Ids in the order of global batches, gathered from all hosts' iterators."""
    iterators = [
        stream.batches(start=start, batch_size=batch_size, host=h, hosts=hosts, **options) for h in range(hosts)
    ]
    gathered = [i for _ in range(steps) for iterator in iterators for i in ids(next(iterator))]
    for iterator in iterators:
        iterator.close()
    return gathered


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> TrainingStream:
    return make_stream(tmp_path_factory.mktemp("one") / "data", x=1024)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> TrainingStream:
    return make_stream(tmp_path_factory.mktemp("two") / "data", phases(((0.3, 0.7), None)), x=1500, y=500)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_batches_have_the_rows_of_the_samples_in_order(one):
    batch = next(one.batches(start=5, batch_size=4))
    assert {key: array.shape for key, array in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "weights"), (4, LENGTH)),
        "bytes": (4,),
    }
    for key, array in batch.items():
        np.testing.assert_array_equal(array, np.stack([one.samples[n][key] for n in range(5, 9)]))


def test_document_attention_reaches_the_rows(one):
    apart = replace(one, data=dataclasses.replace(one.data, document_attention=True), length=20)
    batch = next(apart.batches(start=0, batch_size=2))
    assert batch["segment_ids"].max() >= 3  # 20 tokens of documents of 8
    assert batch["positions"].max() <= 7


def test_a_killed_and_resumed_run_sees_the_same_samples(one):
    straight = global_ids(one, 0, 30, 4)
    before = global_ids(one, 0, 11, 4)
    assert before + global_ids(reopened(one), 11 * 4, 19, 4) == straight


@pytest.mark.parametrize(("hosts", "prefetch", "batch_size"), [(1, 1, 4), (1, 16, 16), (4, 1, 16), (4, 16, 4)])
def test_a_stop_anywhere_repeats_and_loses_nothing(one, hosts, prefetch, batch_size):
    straight = sample_ids(one, 0, 96)
    assert len(set(straight)) == 96
    for start in range(1, 65):
        options = {"threads": 1, "prefetch": prefetch}
        before = global_ids(one, 0, start, 1, **options)  # its buffer of later samples is thrown away
        after = global_ids(one, start, -(-(96 - start) // batch_size), batch_size, hosts, **options)
        assert before + after[: 96 - start] == straight


def test_four_hosts_then_two_then_eight_are_one_stream(one):
    straight = global_ids(one, 0, 15, 16, hosts=4)
    stretches = [global_ids(one, 16 * 5 * i, 5, 16, hosts=hosts) for i, hosts in enumerate((4, 2, 8))]
    assert [i for stretch in stretches for i in stretch] == straight
    assert global_ids(one, 0, 20, 12, hosts=3) == straight  # also with another batch size: 240 samples


def test_threads_and_buffers_do_not_matter(one):
    expected = sample_ids(one, 0, 160)
    for threads, prefetch in ((0, 0), (1, 1), (2, 8), (4, 2)):
        assert global_ids(one, 0, 20, 8, threads=threads, prefetch=prefetch) == expected


def test_resuming_late_reads_no_more_than_a_few_batches(two, monkeypatch):
    reads = []
    real = loader.make_row
    monkeypatch.setattr(loader, "make_row", lambda *args, **kw: reads.append(args[2]) or real(*args, **kw))
    for start in (1_000_000, 1_000_000_000):
        reads.clear()
        begin = time.monotonic()
        changing = replace(two, schedule=phases(((1.0, 2.0), 999_999), ((2.0, 1.0), None)))
        iterator = changing.batches(start=start, batch_size=8, prefetch=4)
        next(iterator)
        assert time.monotonic() - begin < 2
        assert len(reads) <= 8 * (4 + 2)
        iterator.close()


def test_forty_rows_over_four_hosts_are_disjoint_and_complete(tmp_path):
    stream = make_stream(tmp_path / "data", x=40)
    of_hosts = [ids_of_host(stream, host) for host in range(4)]
    assert [len(seen) for seen in of_hosts] == [10] * 4
    assert len(set().union(*of_hosts)) == 40


def ids_of_host(stream, host):
    iterator = stream.batches(start=0, batch_size=8, host=host, hosts=4)
    return [i for _ in range(5) for i in ids(next(iterator))]


def test_hosts_of_an_uneven_epoch_continue_together(tmp_path):
    stream = make_stream(tmp_path / "data", x=41)
    seen = global_ids(stream, 0, 3 * 41, 4, hosts=2)  # 12 epochs; a host never ends before another
    assert all(seen.count(i) == 12 for i in set(seen))


def test_epochs_are_complete_permutations_the_same_in_each_run(tmp_path):
    stream = make_stream(tmp_path / "data", x=64)
    first = sample_ids(stream, 0, 192)
    assert first == sample_ids(reopened(stream), 0, 192)
    epochs = [first[64 * i : 64 * (i + 1)] for i in range(3)]
    assert all(len(set(epoch)) == 64 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sorted(epochs[0]) not in epochs


def test_another_seed_is_another_order(one):
    assert sample_ids(replace(one, seed=1), 0, 9) != sample_ids(one, 0, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "hosts": 4}, "batch_size=6 does not divide over 4 data hosts"),
        ({"batch_size": 8, "hosts": 2, "host": 2}, "host=2 is not one of 2"),
        ({"batch_size": 8, "start": -1}, "start=-1"),
    ],
)
def test_impossible_batches_are_refused_at_once(one, options, message):
    with pytest.raises(ConfigError, match=message):
        one.batches(**{"start": 0, **options})


def test_closing_or_dropping_the_iterator_ends_its_threads(one):
    def workers():
        return [t for t in threading.enumerate() if "grain-prefetch" in t.name]

    before = len(workers())
    closed = one.batches(start=0, batch_size=4, threads=2)
    dropped = one.batches(start=0, batch_size=4, threads=2)
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
from flmjax.data import loader, mixture, prepared
opened = prepared.load(Path(sys.argv[1]))
schedule = (mixture.MixturePhase((1.0,), None),)
stream = loader.TrainingStream(opened, DataConfig(sources=("x",)), 0, 8, schedule)
iterator = stream.batches(start=0, batch_size=4, threads=3, prefetch=6)
print(next(iterator)["tokens"].shape)
"""
    command = [sys.executable, "-c", code, one.prepared.directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "(4, 8)\n"
    assert "Traceback" not in done.stderr


# ---- mixture ---------------------------------------------------------------------------------------------------------


def test_a_change_of_the_mixture_moves_no_cursor(two):
    """Each source continues in the order that it has in a stream whose mixture stays."""
    changed = sample_ids(replace(two, schedule=phases(((1.0, 1.0), 50), ((2.0, 1.0), None))), 0, 200)
    even = sample_ids(replace(two, schedule=phases(((1.0, 1.0), None))), 0, 400)
    for low, high in ((0, 1_000_000), (1_000_000, 2_000_000)):
        of_source = [i for i in changed if low <= i < high]
        assert of_source == [i for i in even if low <= i < high][: len(of_source)]
        assert len(set(of_source)) == len(of_source)
    assert sum(i < 1_000_000 for i in changed[:50]) == 25
    assert sum(i < 1_000_000 for i in changed[50:]) == 100


def test_shares_are_exact_at_every_moment(two):
    stream = replace(two, schedule=phases(((0.535, 0.465), None)))
    first = np.cumsum([i < 1_000_000 for i in sample_ids(stream, 0, 2000)])
    assert np.abs(first - 0.535 * np.arange(1, 2001)).max() <= 1
    assert first[999] == 535


def test_three_sources_stay_within_three_of_the_exact_share(tmp_path):
    weights = np.array([0.7, 0.1, 0.2])
    stream = make_stream(tmp_path / "data", phases((tuple(weights), None)), x=500, y=500, z=500)
    seen = np.array(sample_ids(stream, 0, 1000)) // 1_000_000
    counts = np.cumsum(np.eye(3)[seen], axis=0)
    assert np.abs(counts - np.arange(1, 1001)[:, None] * weights).max() < 3


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.25, 0.0, 0.75)])
def test_a_source_of_weight_0_gives_no_sample(weights):
    """levanter#868: a weight of 0 was refused, or divided by."""
    phases = exact_phases([MixturePhase(weights, None)], len(weights))
    order = SampleOrder(phases, [False] * len(weights))
    counts = np.bincount([order[n][0] for n in range(400)], minlength=len(weights))
    np.testing.assert_array_equal(counts, 400 * np.array(weights))


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 2.0, 1.0), (0.0, 0.0, 3.0), (1.0, 0.0, 2.0)])
def test_weight_0_counts_in_alternating_blocks_too(weights):
    """One source of text and two teachers; a kind without any weight has no block."""
    order = SampleOrder(exact_phases([MixturePhase(weights, None, block=4)], 3), [False, True, True])
    drawn = [order[n][0] for n in range(120)]
    assert {i for i in drawn} == {i for i, weight in enumerate(weights) if weight}
    is_teacher = np.array(drawn).reshape(-1, 4) > 0
    assert (is_teacher == is_teacher[:, :1]).all()


def test_a_source_that_joins_later_starts_at_its_first_sample(two):
    """The weight of the second source is 0 in the first phase, and that of the first source in the last."""
    weights = (((1.0, 0.0), 30), ((1.0, 1.0), 40), ((0.0, 1.0), None))
    drawn = sample_ids(replace(two, schedule=phases(*weights)), 0, 100)
    even = sample_ids(replace(two, schedule=phases(((1.0, 1.0), None))), 0, 200)
    first, second = ([i for i in even if (i >= 1_000_000) is later] for later in (False, True))
    assert drawn[:30] == first[:30]
    assert [i for i in drawn[30:] if i < 1_000_000] == first[30:50]
    assert [i for i in drawn if i >= 1_000_000] == second[:50]
    assert min(drawn[70:]) >= 1_000_000


def test_default_mixture_weights_are_shares_of_training_tokens(two):
    assert default_mixture_weights(two.prepared, two.data) == pytest.approx((0.75, 0.25))
    stated = dataclasses.replace(two.data, mixture_weights=(1.0, 9.0))
    assert default_mixture_weights(two.prepared, stated) == (1.0, 9.0)


def test_steps_of_stages_do_not_matter_while_the_mixture_stays(two):
    cut = replace(two, schedule=phases(((0.3, 0.7), 7), ((0.3, 0.7), 0), ((0.3, 0.7), 31)))
    assert sample_ids(cut, 0, 100) == sample_ids(two, 0, 100)
    assert cut.fingerprint == two.fingerprint


def test_an_empty_phase_between_two_equal_phases_is_none(two):
    with_empty = replace(two, schedule=phases(((1.0, 3.0), 10), ((1.0, 1.0), 0), ((1.0, 3.0), None)))
    without = replace(two, schedule=phases(((1.0, 3.0), None)))
    assert sample_ids(with_empty, 0, 40) == sample_ids(without, 0, 40)
    assert with_empty.fingerprint == without.fingerprint


def test_fingerprint_changes_with_all_that_decides_the_stream(two, tmp_path):
    base = replace(two, schedule=phases(((1.0, 1.0), 10), ((2.0, 1.0), None)))
    other_text = make_stream(tmp_path / "data", base.schedule, x=1500, y=501)
    variants = [
        base,
        replace(base, seed=1),
        replace(base, length=16),
        replace(base, schedule=phases(((1.0, 1.0), 11), ((2.0, 1.0), None))),
        replace(base, schedule=phases(((1.0, 1.0), 10), ((2.1, 1.0), None))),
        replace(base, data=dataclasses.replace(base.data, document_attention=True)),
        other_text,
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert reopened(base).fingerprint == base.fingerprint


def test_fingerprints_are_those_of_stored_checkpoints(one, two):
    """A checkpoint stores the fingerprint of its stream, and is refused by a run with another one."""
    assert one.fingerprint == "be4067ecea237e036416846bae56cd3a03e14e50948d6c63ce448ae908eaec64"
    assert two.fingerprint == "8d03c50ad47365d190d48a9f0683a212d0078defef77419d64028a117b420da1"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "schedule is empty"),
        ([((1.0,), None)], r"phase 0 of the mixture: the weights .* must be 2 numbers, one for each source"),
        ([((1.0, -1.0), None)], "phase 0 of the mixture: the weights"),
        ([((0.0, 0.0), None)], "phase 0 of the mixture: the weights"),
        ([((1.0, float("nan")), None)], "phase 0 of the mixture: the weights"),
        ([((1.0, 1.0), None), ((1.0, 2.0), None)], r"schedule\[0\]: samples=None; only the last"),
    ],
)
def test_impossible_schedules_are_refused(two, schedule, message):
    with pytest.raises(ConfigError, match=message):
        replace(two, schedule=phases(*schedule))


# ---- size and validation ---------------------------------------------------------------------------------------------


def test_fewer_rows_than_a_batch_are_refused_with_both_numbers(tmp_path):
    stream = make_stream(tmp_path / "data", x=5)
    with pytest.raises(ConfigError, match=r"5 rows of 8 tokens, fewer than one batch of 8.*lower batch_size"):
        stream.check_size(8)
    stream.check_size(5)


def test_a_source_without_a_row_is_named(tmp_path):
    data = DataConfig(sources=("x", "y"), vocabulary="bytes", validation_fraction=FRACTION, end_of_document=False)
    letters = "abcdefghijklmnopqrstuvwxyz"
    train, held_out = (next(c for c in letters if is_held_out(c.encode(), FRACTION) is side) for side in (False, True))
    prepared = prepare(data, tmp_path / "data", sources={"x": numbered(50), "y": [train, held_out]})
    with pytest.raises(ConfigError, match="'y' has no training row"):
        TrainingStream(prepared, data, 0, LENGTH, phases(((1.0, 1.0), None))).check_size(4)


def test_validation_rows_are_held_out_and_spread_over_the_sources(two):
    """Full rows come first; with padding only where there are too few."""
    counts = [two.prepared.meta["sources"][s]["validation"]["documents"] for s in ("x", "y")]
    some = two.validation_rows(12)
    assert some["tokens"].shape == (12, LENGTH)
    assert some["weights"].min() == 1
    share = sum(i < 1_000_000 for i in ids(some)) / 12
    assert share == pytest.approx(counts[0] / sum(counts), abs=0.1)
    assert len(set(ids(some))) == 12
    training = {i for s in ("x", "y") for i in ids({"tokens": two.prepared.tokens(s, "train").reshape(-1, LENGTH)})}
    assert len(training) == 2000
    everything = two.validation_rows(1000)
    assert len(everything["tokens"]) == sum(counts)  # the two last rows, padded, come too
    assert everything["weights"].sum() == sum(counts) * LENGTH - 2
    assert training.isdisjoint(ids(everything))
    assert set(ids(some)) <= set(ids(everything))


def test_validation_rows_name_their_source(two):
    validation = two.validation_set(12)
    assert validation.labels == ("x", "y")
    assert [i // 1_000_000 for i in ids(validation.rows)] == validation.sources.tolist()
    assert not validation.is_teacher.any()


def test_validation_shorter_than_a_row_is_one_padded_row(two):
    rows = replace(two, length=100_000).validation_rows(5)
    assert rows["tokens"].shape == (2, 100_000)
    expected = sum(two.prepared.num_tokens(s, "validation") - 1 for s in ("x", "y"))
    assert rows["weights"].sum() == expected
