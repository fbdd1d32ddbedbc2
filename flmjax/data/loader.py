"""Prepared tokens to batches. Sample n of a run is a pure function of (seed, mixture schedule, n).

Nothing here has state: a checkpoint keeps the number of samples seen, and `batches(start=...)` goes on from there in
the same stream, with whatever batch size, hosts, threads or buffer.
"""

import bisect
import fractions
import hashlib
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from flmjax.config import ConfigError, DataConfig, RunConfig
from flmjax.data.packing import make_proposition_row, make_row, num_rows, proposition_rows
from flmjax.data.prepared import Prepared

STREAM_VERSION = 1  # of the rules below that decide sample n
ENDLESS = 2**50  # samples; Grain divides lengths as floats, which hold this exactly and sys.maxsize not


class Segment(NamedTuple):
    """A stretch of the run with one mixture: weights per source, and its samples (None: without end).

    Text and teachers alternate in blocks of `block` samples; 0 mixes them evenly.
    """

    weights: tuple[float, ...]
    samples: int | None
    block: int = 0


def default_weights(prepared: Prepared, data: DataConfig) -> tuple[float, ...]:
    """`data.mixture_weights`; where that is None the rates of data.mixture, or shares by number of training tokens."""
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


def mixture_schedule(config: RunConfig, prepared: Prepared) -> list[Segment]:
    """The mixture's weights and samples of every stage; the last goes on for ever."""
    weights = default_weights(prepared, config.data)
    alternating = config.data.teacher_mixing == "alternating" and prepared.marks is not None
    schedule = []
    for i, stage in enumerate(config.stages):
        weights = stage.mixture_weights or weights
        batches_of_stage = stage.steps + config.schedule[i].tuning_steps
        samples = None if i + 1 == len(config.stages) else batches_of_stage * stage.batch_size
        schedule.append(Segment(weights, samples, stage.batch_size if alternating else 0))
    return schedule


def check_size(prepared: Prepared, data: DataConfig, length: int, batch_size: int) -> None:
    """Refuse a training set that does not fill one batch, or a source that fills no row.

    Raises:
        ConfigError: naming rows, batch size and what would do.
    """
    rows = {s: len(_rows(prepared, s, "train", length, data)) for s in prepared.sources}
    for source, count in rows.items():
        if count == 0:
            raise ConfigError(f"data.sources: '{source}' has no training row (one token at most); add text")
    if sum(rows.values()) < batch_size:
        raise ConfigError(
            f"the training set has {sum(rows.values())} rows of {length} tokens, fewer than one batch of {batch_size}: "
            f"add text, or lower batch_size or max_length"
        )


def mixture(
    prepared: Prepared, data: DataConfig, *, seed: int, length: int, schedule: Sequence[Segment]
) -> grain.MapDataset:
    """The endless stream of training rows: element n is sample n of the run, a dict as packing.make_row gives it.

    Each source is shuffled over all its rows, in a new order every epoch, and has its own cursor that a change of the
    mixture does not move: nothing of a source is repeated before all of it was seen. Within a segment the sources
    alternate evenly; after n samples each has had its share of n to within the number of sources. The last segment
    goes on for ever.

    Raises:
        ConfigError: for a schedule that is empty, or with weights that are not positive or not one per source.
    """
    order = _Order(_canonical(schedule, len(prepared.sources)), [prepared.is_teacher(s) for s in prepared.sources])
    datasets = []
    for source in prepared.sources:
        rows = _rows(prepared, source, "train", length, data)
        source_seed = int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:4])
        datasets.append(grain.MapDataset.source(rows).shuffle(seed=source_seed).repeat())
    return grain.MapDataset.select_from_datasets(datasets, order)


def fingerprint(prepared: Prepared, data: DataConfig, *, seed: int, length: int, schedule: Sequence[Segment]) -> str:
    """sha256 (hex) over everything that decides the stream; equal fingerprints, equal streams.

    Neighbouring segments of the same mixture are one, and the end of the last segment does not count: where stages
    begin does not matter while the mixture stays.
    """
    parts = {
        "version": STREAM_VERSION,
        "sources": [[source, *prepared.checksums(source, "train")] for source in prepared.sources],
        "seed": seed,
        "length": length,
        "document_attention": data.document_attention,
        "end_id": prepared.tokenizer.end_id,
        "schedule": [  # as it was written before there were blocks
            segment if segment[2] else segment[:2] for segment in _canonical(schedule, len(prepared.sources))
        ],
    }
    if prepared.marks is not None:
        files = {s: f"{prepared.meta['sources'][s]['slug']}-train.weights.u8" for s in prepared.sources}
        parts["teachers"] = {
            s: prepared.meta["files"][files[s]]["sha256"] for s in prepared.sources if prepared.is_teacher(s)
        }
        parts["teacher_weight"] = data.teacher_weight
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def batches(
    dataset: grain.MapDataset,
    *,
    start: int,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Batches of samples start, start + 1, ... without end; this host's part of each: arrays (batch_size / hosts, L).

    Host h has rows h B/H to (h + 1) B/H - 1 of every global batch. `threads` threads keep `prefetch` batches ready;
    0 reads in the caller's thread. `close()` ends the threads, and so does dropping the iterator.

    Raises:
        ConfigError: when the batch does not divide over the hosts, or there is no such host.
    """
    if not 0 <= host < hosts:
        raise ConfigError(f"host={host} is not one of {hosts} data hosts (0 to {hosts - 1})")
    if batch_size < 1 or batch_size % hosts:
        raise ConfigError(f"batch_size={batch_size} does not divide over {hosts} data hosts")
    if start < 0:
        raise ConfigError(f"start={start} must not be negative")
    share = _HostShare(start, batch_size, host, batch_size // hosts)
    own = grain.MapDataset.select_from_datasets([dataset], share).batch(batch_size // hosts)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
    return iter(own.to_iter_dataset(options))


def validation_rows(prepared: Prepared, data: DataConfig, *, length: int, rows: int) -> dict[str, np.ndarray]:
    """At most `rows` held-out rows, evenly spread over the sources' streams: arrays (R, length), always the same.

    Full rows are taken; those with padding only where the full ones are fewer than `rows`. Where there are teachers, at
    most `rows` rows of theirs follow.

    Raises:
        ConfigError: when there is no held-out row.
    """
    made = []
    for of_teachers in (False, True):
        names = [source for source in prepared.sources if prepared.is_teacher(source) is of_teachers]
        sources = [_rows(prepared, source, "validation", length, data) for source in names]
        made += _spread(sources, rows)
    if not made:
        raise ConfigError("there is no validation row; add text or raise data.validation_fraction")
    return {key: np.stack([row[key] for row in made]) for key in made[0]}


def _spread(sources: Sequence["_Rows"], rows: int) -> list[dict[str, np.ndarray]]:
    starts = np.cumsum([0] + [source.full_rows for source in sources])  # of each source among all full rows
    full = int(starts[-1])
    picked = range(full) if full <= rows else [(2 * i + 1) * full // (2 * rows) for i in range(rows)]
    chosen = []
    for i in picked:
        at = int(np.searchsorted(starts, i, side="right")) - 1
        chosen.append((sources[at], i - int(starts[at])))
    padded = [(source, i) for source in sources for i in range(source.full_rows, len(source))]
    chosen += padded[: rows - len(chosen)]
    return [source[i] for source, i in chosen]


def _rows(prepared: Prepared, source: str, split: str, length: int, data: DataConfig) -> "_Rows":
    if prepared.is_teacher(source):
        return _PropositionRows(prepared, source, split, length, data)
    return _Rows(prepared, source, split, length, data)


class _Rows:
    """A source's rows in the order of its stream: a Grain random-access source."""

    def __init__(self, prepared: Prepared, source: str, split: str, length: int, data: DataConfig):
        self._tokens = prepared.tokens(source, split)
        self._offsets = prepared.offsets(source, split)
        self._length = length
        self._end_id = prepared.tokenizer.end_id
        self._document_attention = data.document_attention
        self._beside_teachers = prepared.marks is not None  # whose rows have segments
        self.full_rows = max(len(self._tokens) - 1, 0) // length

    def __len__(self) -> int:
        return num_rows(len(self._tokens), self._length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = make_row(
            self._tokens,
            self._offsets,
            int(index),
            self._length,
            end_id=self._end_id,
            document_attention=self._document_attention,
            segments=self._beside_teachers,
        )
        if self._beside_teachers:
            row["decisive"] = np.zeros(self._length, np.float32)
            row["marks"] = np.zeros(2, np.int32)
        return row


class _PropositionRows(_Rows):
    """A teacher's rows: whole propositions, that do not see one another."""

    def __init__(self, prepared: Prepared, source: str, split: str, length: int, data: DataConfig):
        super().__init__(prepared, source, split, length, data)
        weights, marks = prepared.weights(source, split), prepared.marks
        assert weights is not None
        assert marks is not None
        self._weights = weights
        self._weight = data.teacher_weight
        self._marks = np.array([marks.true[marks.differs], marks.false[marks.differs]], np.int32)
        self._firsts = proposition_rows(self._offsets, length)
        self.full_rows = len(self)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = make_proposition_row(
            self._tokens,
            self._offsets,
            self._weights,
            range(self._firsts[index], self._firsts[index + 1]),
            self._length,
            end_id=self._end_id,
            weight=self._weight,
        )
        row["marks"] = self._marks
        return row


_Shares = tuple[int, ...]  # of the sources, in lowest terms


def _canonical(schedule: Sequence[Segment], num_sources: int) -> list[tuple[_Shares, int | None, int]]:
    """(exact integer shares, samples, block) per segment; equal neighbours merged; the last one open."""
    segments: list[tuple[_Shares, int | None, int]] = []
    for i, (weights, samples, block) in enumerate(schedule):
        if len(weights) != num_sources or not all(math.isfinite(w) and w > 0 for w in weights):
            raise ConfigError(f"schedule[{i}]: weights {weights} must be {num_sources} positive numbers, one a source")
        if i < len(schedule) - 1 and (samples is None or samples < 0):
            raise ConfigError(f"schedule[{i}]: samples={samples}; only the last segment is without end")
        ratios = [fractions.Fraction(str(weight)) for weight in weights]  # 0.535 is 107/200, as it was written
        whole = math.lcm(*(ratio.denominator for ratio in ratios))
        counts = [int(ratio * whole) for ratio in ratios]
        shares = tuple(count // math.gcd(*counts) for count in counts)
        if samples == 0 and i < len(schedule) - 1:
            continue
        if segments and (segments[-1][0], segments[-1][2]) == (shares, block):
            before = segments.pop()[1] or 0
            samples = None if samples is None else before + samples
        segments.append((shares, samples, block))
    if not segments:
        raise ConfigError("the mixture schedule is empty")
    return [*segments[:-1], (segments[-1][0], None, segments[-1][2])]


def _counts(shares: _Shares, n: int) -> list[int]:
    """How many of a segment's first n samples each source has.

    Each source takes its share, rounded up, of what those before it left; so from n to n + 1 exactly one count rises.
    """
    counts = []
    left, whole = n, sum(shares)
    for share in shares:
        rest = left * (whole - share) // whole
        counts.append(left - rest)
        left, whole = rest, whole - share
    return counts


def _alternating_counts(shares: _Shares, teachers: Sequence[bool], block: int, n: int) -> list[int]:
    """_counts in blocks of samples that are all text or all a teacher's; each kind is mixed within itself."""
    kinds = [[i for i, teacher in enumerate(teachers) if teacher is kind] for kind in (False, True)]
    of_kinds = tuple(sum(shares[i] for i in kind) for kind in kinds)
    blocks, rest = divmod(n, block)
    whole, begun = _counts(of_kinds, blocks), _counts(of_kinds, blocks + 1)
    counts = [0] * len(shares)
    for kind, before, after in zip(kinds, whole, begun, strict=True):
        own = _counts(tuple(shares[i] for i in kind), before * block + (after - before) * rest)
        for i, count in zip(kind, own, strict=True):
            counts[i] = count
    return counts


class _Order(grain.transforms.DatasetSelectionMap):
    """Sample n of the run -> (source, index in that source's own endless stream)."""

    def __init__(self, segments: list[tuple[_Shares, int | None, int]], teachers: Sequence[bool]):
        self._segments = segments
        self._teachers = teachers
        self._starts = [0]  # first sample of each segment
        self._cursors = [[0] * len(teachers)]  # what each source has given before it
        for i, (_, samples, _) in enumerate(segments[:-1]):
            assert samples is not None
            self._starts.append(self._starts[-1] + samples)
            given = self._given(i, samples)
            self._cursors.append([c + g for c, g in zip(self._cursors[-1], given, strict=True)])

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        segment = bisect.bisect_right(self._starts, index) - 1
        n = index - self._starts[segment]
        now, then = self._given(segment, n), self._given(segment, n + 1)
        source = next(i for i in range(len(now)) if then[i] > now[i])
        return source, self._cursors[segment][source] + now[source]

    def _given(self, segment: int, n: int) -> list[int]:
        """How many of the segment's first n samples each source has."""
        shares, _, block = self._segments[segment]
        return _alternating_counts(shares, self._teachers, block, n) if block else _counts(shares, n)


class _HostShare(grain.transforms.DatasetSelectionMap):
    """Row i of one host's batches, laid end to end -> the sample it is."""

    def __init__(self, start: int, batch_size: int, host: int, rows: int):
        self._first = start + host * rows
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return (ENDLESS - self._first) // self._batch_size * self._rows

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, row = divmod(index, self._rows)
        return 0, self._first + step * self._batch_size + row
