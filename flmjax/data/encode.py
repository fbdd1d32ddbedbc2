"""Documents to tokens in parallel processes.

The documents of a split are divided into parts. Each part becomes a file of tokens, and a file that an interrupted
preparation left is used again.
"""

import dataclasses
import itertools
import multiprocessing
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flmjax.data.prepared import COUNTS, DECISIVE
from flmjax.data.round_trip import NO_CORRECTIONS, round_trip
from flmjax.data.sources.freelm import Marks
from flmjax.data.spool import NO_JUDGEMENT, Spooled
from flmjax.data.tokenizers import Tokenizer, load_tokenizer

PART_BYTES = (4 << 20, 32 << 20)  # least and most text of a part; a process needs about ten times as much memory
PROCESSES_FROM = 16 << 20  # bytes of text; for less, starting processes takes longer than the work


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive documents of a split.

    Attributes:
        text: file of the split's documents (spool.Spooled).
        start: first byte of the part in that file.
        sizes, judgements: of the part's documents, as in Spooled.
        path: file of the part's tokens.
    """

    text: Path
    start: int
    sizes: np.ndarray
    judgements: np.ndarray
    path: Path

    def texts(self) -> list[str]:
        """The part's documents."""
        with self.text.open("rb") as file:
            file.seek(self.start)
            return [file.read(size).decode("utf-8") for size in self.sizes]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns documents into tokens: a text into its ids and the end token, a proposition into its ids and a mark.

    Attributes:
        end_of_document: whether the end token follows each text.
        marks: of the propositions; None if no source is a teacher's.
    """

    tokenizer: Tokenizer
    end_of_document: bool
    marks: Marks | None

    def encode(self, part: Part) -> None:
        """Write the file of a part: "tokens", "lengths" of the documents in tokens, of propositions loss "weights".

        Only the mark of a proposition has loss weights other than 0: the model learns the judgement, not the text. The
        file also has "corrections" of the tokens' bytes (round_trip.py), and the number of "changed" documents, those
        that do not decode to their text.
        """
        end = np.array([self.tokenizer.end_id] if self.end_of_document else [], np.uint32)
        tokens: list[np.ndarray] = []  # two arrays for each document: its text, and the end token or mark
        loss_weights: list[np.ndarray] = []
        corrections, changed, first = [NO_CORRECTIONS], 0, 0
        texts = part.texts()
        for text, ids, judgement in zip(texts, self.tokenizer.encode_batch(texts), part.judgements, strict=True):
            comparison = round_trip(self.tokenizer, text, ids)
            changed += not comparison.is_exact
            if judgement == NO_JUDGEMENT:  # propositions have no bits per byte
                corrections.append(comparison.corrections + np.array([first, 0]))
                first += len(ids) + len(end)
            if judgement == NO_JUDGEMENT:
                tokens += [ids, end]
                continue
            assert self.marks is not None
            mark = np.array(self.marks.true if judgement else self.marks.false, np.uint32)
            tokens += [ids, mark]
            loss_weights.append(np.zeros(len(ids) + len(mark), np.uint8))
            loss_weights[-1][len(ids) :] = COUNTS
            loss_weights[-1][len(ids) + self.marks.differs] = DECISIVE
        lengths = np.array([len(array) for array in tokens], np.uint64)
        columns = {"tokens": np.concatenate(tokens), "lengths": lengths[::2] + lengths[1::2]}
        columns |= {"corrections": np.concatenate(corrections), "changed": np.array(changed)}
        if loss_weights:
            columns["weights"] = np.concatenate(loss_weights)
        partial = part.path.with_suffix(".tmp.npz")
        np.savez(partial, allow_pickle=False, **columns)
        os.replace(partial, part.path)

    def read(self, part: Part) -> dict[str, np.ndarray]:
        """The arrays of a part; a file that a power cut left damaged is written again."""
        try:
            with np.load(part.path) as stored:
                return {**stored, "corrections": stored["corrections"]}  # an older version wrote no corrections
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self.encode(part)
            with np.load(part.path) as stored:
                return dict(stored)


def split_parts(spooled: Spooled, folder: Path, name: str) -> list[Part]:
    """The documents of a split in parts; the division depends on the documents alone."""
    ends = np.cumsum(spooled.sizes)
    total = int(ends[-1]) if len(ends) else 0
    size = min(max(total // 1000, PART_BYTES[0]), PART_BYTES[1])
    borders = [0]
    while borders[-1] < len(ends):
        start = int(ends[borders[-1] - 1]) if borders[-1] else 0
        borders.append(max(borders[-1] + 1, int(np.searchsorted(ends, start + size, side="right"))))
    parts = []
    for i, (first, last) in enumerate(itertools.pairwise(borders)):
        start = int(ends[first - 1]) if first else 0
        path = folder / f"{name}.part{i:06d}.npz"
        parts.append(Part(spooled.path, start, spooled.sizes[first:last], spooled.judgements[first:last], path))
    return parts


def num_cores() -> int:
    """Number of cores that this process may use; where the system does not tell, of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_parts(parts: Iterable[Part], encoder: Encoder, folder: Path, workers: int | None, progress: bool) -> None:
    """Write the files of all parts that have none yet.

    Args:
        folder: of the tokenizer's files.
        workers: number of processes; None: one for each core.
        progress: show a progress bar on standard error.
    """
    missing = [part for part in parts if not part.path.exists()]
    total = sum(int(part.sizes.sum()) for part in missing)
    workers = min(workers or num_cores(), len(missing))
    # disable=None: silent where standard error is no terminal
    with tqdm(
        desc="text to tokens", total=total, unit="B", unit_scale=True, leave=False, disable=None if progress else True
    ) as bar:
        for part in encoded(missing, encoder, folder, workers if total >= PROCESSES_FROM else 1):
            bar.update(int(part.sizes.sum()))


def encoded(parts: list[Part], encoder: Encoder, folder: Path, workers: int) -> Iterator[Part]:
    """Each part as soon as its file is written, in any order."""
    if workers <= 1:
        for part in parts:
            encoder.encode(part)
            yield part
        return
    # Spawned, because a process that uses JAX has threads and must not be forked.
    context = multiprocessing.get_context("spawn")
    arguments = (folder, encoder.end_of_document, encoder.marks)
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=arguments) as pool:
        try:
            futures = {pool.submit(encode_in_worker, part): part for part in parts}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_encoder: Encoder | None = None  # of this process, if it is a worker


def _start(folder: Path, end_of_document: bool, marks: Marks | None) -> None:
    global _encoder
    _encoder = Encoder(load_tokenizer(folder), end_of_document, marks)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Otherwise the workers of a killed process would wait for work for ever.
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def encode_in_worker(part: Part) -> None:
    """Write the file of a part with the encoder of this worker process."""
    assert _encoder is not None
    _encoder.encode(part)
