"""`TrainingStream`: prepared tokens as batches. Sample n of a run is a function of seed, mixture schedule and n.

The stream has no state: a checkpoint stores the number of samples seen, and `batches(start=...)` continues the stream
from there with any batch size and any number of hosts, threads and buffered batches. Samples may be left out
(skipped.py, which explains the two numbers of a sample).

A row is a sequence of `length` tokens: one sample of the stream, one row of a batch (batch.py).
"""

import bisect
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import grain
import numpy as np

from flmjax.config import ConfigError, DataConfig, RunConfig
from flmjax.config.sample_ranges import Ranges, count_samples, join_ranges, parse_ranges
from flmjax.data.batch import Batch, BatchKind
from flmjax.data.mixture import ENDLESS, ExactPhase, MixturePhase, SampleOrder, exact_phases, mixture_schedule
from flmjax.data.packing import first_propositions, make_proposition_row, make_row, num_rows
from flmjax.data.prepared import Prepared, short_names
from flmjax.data.skipped import check_blocks, lengthened, samples_passed, stream_number
from flmjax.data.sources.documents import key_bytes

STREAM_VERSION = 1  # of the rules in this package that decide sample n


@dataclasses.dataclass(frozen=True)
class TrainingStream:
    """The endless stream of training rows of a run, and the validation rows of the same data.

    Each source is shuffled over all its rows, in a new order every epoch, and has a cursor that a change of the mixture
    does not move: no row of a source is repeated before all its rows were seen. Within a phase the sources alternate
    evenly; after n samples each has supplied its share of n to within the number of sources.

    Attributes:
        prepared: the token files.
        data: settings of packing and loss: document_attention, teacher_weight.
        seed: of the order of rows.
        length: tokens of a row.
        schedule: phases of the mixture, of the samples that are read; the last has no end.
        skipped: samples that `batches` leaves out, by their numbers in the stream.

    Raises:
        ConfigError: for a schedule without phases, or with mixture weights that are negative, all 0 or not one for
            each source (mixture.exact_phases); for skipped samples that are not whole blocks of it.
    """

    prepared: Prepared
    data: DataConfig
    seed: int
    length: int
    schedule: tuple[MixturePhase, ...]
    skipped: Ranges = ()

    def __post_init__(self) -> None:
        _ = self._phases  # raises the errors of a schedule at once

    @classmethod
    def of_run(cls, config: RunConfig, prepared: Prepared, rolled_back: Ranges = ()) -> "TrainingStream":
        """The stream of a run.

        Args:
            rolled_back: samples that the run skips beside data.skip_samples.
        """
        schedule = mixture_schedule(config, prepared)
        skipped = join_ranges([*parse_ranges(config.data.skip_samples, "data.skip_samples"), *rolled_back])
        return cls(prepared, config.data, config.seed, config.model.max_length, schedule, skipped)

    def samples_passed(self, read: int) -> int:
        """Number in the stream after `read` samples that are read; the run's first sample counts those before it."""
        return samples_passed(self.skipped, read)

    @functools.cached_property
    def samples(self) -> grain.MapDataset[Batch]:
        """The samples, skipped ones too: element n is sample n of the stream, a Batch without the axis B."""
        datasets = []
        for source in self.prepared.sources:
            seed = int.from_bytes(hashlib.sha256(key_bytes(f"{self.seed} {source}")).digest()[:4])
            datasets.append(grain.MapDataset.source(self._rows(source, "train")).shuffle(seed=seed).repeat())
        return grain.MapDataset.select_from_datasets(datasets, self._order)

    def source_samples(self, start: int, end: int) -> list[int]:
        """Number of samples that each source gives among the samples start to end - 1 of the stream."""
        counts = zip(self._order.counts_before(start), self._order.counts_before(end), strict=True)
        return [after - before for before, after in counts]

    def epochs(self, samples: int) -> list[float]:
        """Epochs of each source in the first `samples` samples of the stream: its samples there by its training rows.

        Raises:
            OSError: if the token files are gone.
        """
        rows = (max(len(self._rows(source, "train")), 1) for source in self.prepared.sources)
        return [count / number for count, number in zip(self.source_samples(0, samples), rows, strict=True)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of everything that decides the stream: equal fingerprints mean equal streams.

        Neighbouring phases of the same mixture count as one, and the end of the last phase does not count: the steps
        at which stages begin do not matter while the mixture stays the same.
        """
        prepared, data = self.prepared, self.data
        identity: dict[str, Any] = {
            "version": STREAM_VERSION,
            "sources": [[source, *prepared.checksums(source, "train")] for source in prepared.sources],
            "seed": self.seed,
            "length": self.length,
            "document_attention": data.document_attention,
            "end_id": prepared.tokenizer.end_id,
            "schedule": [  # without the block if it is 0: older fingerprints had no blocks
                phase if phase.block else phase[:2] for phase in self._phases
            ],
        }
        if prepared.marks is not None:
            teachers = [source for source in prepared.sources if prepared.is_teacher(source)]
            identity["teachers"] = {source: prepared.loss_weights_checksum(source, "train") for source in teachers}
            identity["teacher_weight"] = data.teacher_weight
        if self.skipped:
            identity["skipped"] = self.skipped
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def batches(self, **options: int) -> grain.DatasetIterator[Batch]:
        """Iterator over batch_dataset(**options); its `close()` ends its threads, and so does dropping it."""
        return iter(self.batch_dataset(**options))

    def batch_dataset(
        self, *, start: int, batch_size: int, host: int = 0, hosts: int = 1, threads: int = 1, prefetch: int = 4
    ) -> grain.IterDataset[Batch]:
        """Endless batches of the samples start, start + 1, ... of those that are read; this host's rows of each.

        Args:
            start: read number of the first sample.
            batch_size: rows of a batch over all hosts, B.
            host, hosts: host h has rows h B / hosts to (h + 1) B / hosts - 1 of every batch.
            threads: threads that read. 0: the caller's thread reads.
            prefetch: batches that are kept ready.

        Raises:
            ConfigError: if the batch does not divide over the hosts, if there is no such host, or for a start below 0.
        """
        if not 0 <= host < hosts:
            raise ConfigError(f"host={host} is not one of {hosts} data hosts (0 to {hosts - 1})")
        if batch_size < 1 or batch_size % hosts:
            raise ConfigError(f"batch_size={batch_size} does not divide over {hosts} data hosts")
        if start < 0:
            raise ConfigError(f"start={start} must not be negative")
        share = _HostShare(start, batch_size, host, batch_size // hosts, self.skipped)
        rows_of_host = grain.MapDataset.select_from_datasets([self.samples], share)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        return rows_of_host.batch(batch_size // hosts).to_iter_dataset(options)

    def validation_set(self, rows: int) -> "ValidationSet":
        """At most `rows` held-out rows of text, then at most `rows` of teachers, evenly spread over the sources.

        The rows are the same at every call. Every source has a row if `rows` are enough (spread_rows).

        Raises:
            ConfigError: if no row is held out.
        """
        names, is_teacher = self.prepared.sources, self._is_teacher
        of_sources = [self._rows(source, "validation") for source in names]
        chosen: list[tuple[int, int]] = []
        for kind in (False, True):
            sources = [i for i in range(len(names)) if is_teacher[i] is kind]
            counts = [(of_sources[i].full_rows, len(of_sources[i])) for i in sources]
            chosen += [(sources[i], row) for i, row in spread_rows(counts, rows)]
        if not chosen:
            raise ConfigError("there is no validation row; add text or raise data.validation_fraction")
        batches = [of_sources[i][row] for i, row in chosen]
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}  # type: ignore[literal-required]
        return ValidationSet(
            cast(Batch, stacked),
            np.array([i for i, _ in chosen], np.int32),
            short_names(names),
            np.array(is_teacher),
        )

    def validation_rows(self, rows: int) -> Batch:
        """The rows of `validation_set`."""
        return self.validation_set(rows).rows

    def check_size(self, batch_size: int) -> None:
        """Refuse a training set that does not fill a batch, or a source that does not fill a row.

        Raises:
            ConfigError: naming the source, or the number of rows, the batch size and the remedies.
        """
        rows = {source: len(self._rows(source, "train")) for source in self.prepared.sources}
        for source, count in rows.items():
            if count == 0:
                raise ConfigError(f"source '{source}' has no training row (fewer than two tokens); add text")
        if sum(rows.values()) < batch_size:
            raise ConfigError(
                f"the training set has {sum(rows.values())} rows of {self.length} tokens, fewer than one batch of "
                f"{batch_size}: add text, or lower batch_size or max_length"
            )

    @functools.cached_property
    def _phases(self) -> list[ExactPhase]:
        exact_phases(self.schedule, len(self.prepared.sources))  # messages number the phases of the schedule
        phases = exact_phases(lengthened(self.schedule, self.skipped), len(self.prepared.sources))
        check_blocks(phases, self.skipped)
        return phases

    @functools.cached_property
    def _order(self) -> SampleOrder:
        return SampleOrder(self._phases, self._is_teacher)

    @property
    def _is_teacher(self) -> list[bool]:
        return [self.prepared.is_teacher(source) for source in self.prepared.sources]

    def _rows(self, source: str, split: str) -> "_TextRows | _PropositionRows":
        rows = _PropositionRows if self.prepared.is_teacher(source) else _TextRows
        return rows(self.prepared, source, split, self.length, self.data)


class ValidationSet(NamedTuple):
    """R held-out rows of the S sources of a run.

    Attributes:
        rows: the rows, a Batch of R.
        sources: source of each row, int32 (R,), 0 to S - 1.
        labels: short name of each source, S.
        is_teacher: whether each source is a teacher's, bool (S,).
    """

    rows: Batch
    sources: np.ndarray
    labels: tuple[str, ...]
    is_teacher: np.ndarray


def spread_rows(counts: Sequence[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """(source, row) of at most `rows` rows, evenly spread over the full rows of all sources.

    A source whose share of `rows` is less than one row has one row nevertheless, unless there are more such sources
    than `rows`. Rows with padding are taken of a source without full rows, and where there are too few full rows.

    Args:
        counts: for each source the number of full rows, and of all rows.
    """
    small: set[int] = set()
    while True:
        spread, total = rows - len(small), sum(full for i, (full, _) in enumerate(counts) if i not in small)
        less = {i for i, (full, count) in enumerate(counts) if i not in small and count and full * spread < total}
        if not less or len(less) >= spread:
            break
        small |= less
    sources = [i for i in range(len(counts)) if i not in small]
    starts = np.cumsum([0] + [counts[i][0] for i in sources])  # of each source among all full rows
    full = int(starts[-1])
    indices = range(full) if full <= spread else [(2 * i + 1) * full // (2 * spread) for i in range(spread)]
    chosen = []
    for index in indices:
        place = int(np.searchsorted(starts, index, side="right")) - 1
        chosen.append((sources[place], index - int(starts[place])))
    chosen += [(i, counts[i][0] // 2) for i in sorted(small)]
    padded = [(i, row) for i, (full, count) in enumerate(counts) for row in range(full, count)]
    return chosen + [row for row in padded if row not in chosen][: rows - len(chosen)]


class _TextRows:
    """The rows of a source of text in the order of its token stream: a random-access source of Grain."""

    def __init__(self, prepared: Prepared, source: str, split: str, length: int, data: DataConfig):
        self._tokens = prepared.tokens(source, split)
        self._offsets = prepared.offsets(source, split)
        self._length = length
        self._end_id = prepared.tokenizer.end_id
        self._document_attention = data.document_attention
        self._kind = BatchKind.of(data, prepared.marks is not None)
        self._token_bytes = prepared.tokenizer.token_bytes
        self._corrections = prepared.byte_corrections(source, split)
        self.full_rows = max(len(self._tokens) - 1, 0) // length

    def __len__(self) -> int:
        return num_rows(len(self._tokens), self._length)

    def __getitem__(self, index: int) -> Batch:
        row = make_row(
            self._tokens,
            self._offsets,
            int(index),
            self._length,
            end_id=self._end_id,
            document_attention=self._document_attention,
            segments=self._kind.segments,
        )
        row["bytes"] = self._bytes(int(index), row)
        if self._kind.teachers:
            row["decisive"] = np.zeros(self._length, np.float32)
            row["marks"] = np.zeros(2, np.int32)
        return row

    def _bytes(self, index: int, row: Batch) -> np.ndarray:
        """UTF-8 bytes of text that the row's weighted targets stand for, float32 ()."""
        sizes_L = self._token_bytes[row["targets"]]
        if len(self._corrections):
            first = index * self._length + 1  # token of the stream that is the row's first target
            places = (first, first + self._length)
            start, end = (bisect.bisect_left(self._corrections, place, key=lambda pair: pair[0]) for place in places)
            corrections = np.asarray(self._corrections[start:end])
            sizes_L[corrections[:, 0] - first] += corrections[:, 1]
        return np.array((sizes_L * row["weights"]).sum(), np.float32)


class _PropositionRows:
    """The rows of a teacher, each of complete propositions: a random-access source of Grain."""

    def __init__(self, prepared: Prepared, source: str, split: str, length: int, data: DataConfig):
        loss_weights, marks = prepared.loss_weights(source, split), prepared.marks
        assert loss_weights is not None
        assert marks is not None
        self._tokens = prepared.tokens(source, split)
        self._offsets = prepared.offsets(source, split)
        self._loss_weights = loss_weights
        self._length = length
        self._end_id = prepared.tokenizer.end_id
        self._mark_weight = data.teacher_weight
        self._marks = np.array([marks.true[marks.differs], marks.false[marks.differs]], np.int32)
        self._firsts = first_propositions(self._offsets, length)
        self.full_rows = len(self)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> Batch:
        row = make_proposition_row(
            self._tokens,
            self._offsets,
            self._loss_weights,
            range(self._firsts[index], self._firsts[index + 1]),
            self._length,
            end_id=self._end_id,
            mark_weight=self._mark_weight,
        )
        row["marks"] = self._marks
        row["bytes"] = np.zeros((), np.float32)
        return row


class _HostShare(grain.transforms.DatasetSelectionMap):
    """Row i of one host's batches, laid end to end -> number of the sample in the stream."""

    def __init__(self, start: int, batch_size: int, host: int, rows: int, skipped: Ranges):
        self._first = start + host * rows
        self._batch_size = batch_size
        self._rows = rows
        self._skipped = skipped

    def __len__(self) -> int:
        return (ENDLESS - count_samples(self._skipped) - self._first) // self._batch_size * self._rows

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, row = divmod(index, self._rows)
        return 0, stream_number(self._skipped, self._first + step * self._batch_size + row)
