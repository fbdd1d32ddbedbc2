"""Spooled text to tokens, in parts that parallel processes write; a part that is there is not written again."""

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

from flmjax.data.packing import COUNTS, DECISIVE
from flmjax.data.sources.freelm import Marks
from flmjax.data.spool import NO_JUDGEMENT, Spooled
from flmjax.data.tokenizers import Tokenizer, load_tokenizer

PART_BYTES = (4 << 20, 32 << 20)  # least and most text of a part; memory of a process is some ten times that
PROCESSES_FROM = 16 << 20  # bytes of text; starting processes for less takes longer than the work


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive documents of a split, from byte `start` of its text, and the file that their tokens go to."""

    text: Path
    start: int
    sizes: np.ndarray
    judgements: np.ndarray
    path: Path

    def texts(self) -> list[str]:
        """The documents."""
        with self.text.open("rb") as file:
            file.seek(self.start)
            return [file.read(size).decode("utf-8") for size in self.sizes]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What makes tokens of documents: ids and the end token for a text; ids and a mark for a proposition."""

    tokenizer: Tokenizer
    end_of_document: bool
    marks: Marks | None

    def encode(self, part: Part) -> None:
        """Write the part: tokens uint32, the documents' lengths in tokens, for propositions loss weights uint8.

        A proposition's weights are 0 but for its mark: the judgement is all that is learnt.
        """
        end = np.array([self.tokenizer.end_id] if self.end_of_document else [], np.uint32)
        tokens: list[np.ndarray] = []  # of each document two arrays: its text and what closes it
        weights: list[np.ndarray] = []
        for ids, judgement in zip(self.tokenizer.encode_batch(part.texts()), part.judgements, strict=True):
            if judgement == NO_JUDGEMENT:
                tokens += [ids, end]
                continue
            assert self.marks is not None
            mark = np.array(self.marks.true if judgement else self.marks.false, np.uint32)
            tokens += [ids, mark]
            weights.append(np.zeros(len(ids) + len(mark), np.uint8))
            weights[-1][len(ids) :] = COUNTS
            weights[-1][len(ids) + self.marks.differs] = DECISIVE
        lengths = np.array([len(array) for array in tokens], np.uint64)
        columns = {"tokens": np.concatenate(tokens), "lengths": lengths[::2] + lengths[1::2]}
        if weights:
            columns["weights"] = np.concatenate(weights)
        partial = part.path.with_suffix(".tmp.npz")
        np.savez(partial, allow_pickle=False, **columns)
        os.replace(partial, part.path)

    def read(self, part: Part) -> dict[str, np.ndarray]:
        """The part's arrays; one that a kill of the machine left damaged is written anew."""
        try:
            with np.load(part.path) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            self.encode(part)
            with np.load(part.path) as stored:
                return dict(stored)


def split_parts(spooled: Spooled, folder: Path, name: str) -> list[Part]:
    """Parts of a split's documents; the same for the same documents."""
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


def encode_parts(parts: Iterable[Part], encoder: Encoder, folder: Path, workers: int | None, progress: bool) -> None:
    """Write every part that is not there, in `workers` processes (None: one a core); `folder` has the tokenizer."""
    missing = [part for part in parts if not part.path.exists()]
    total = sum(int(part.sizes.sum()) for part in missing)
    workers = min(workers or len(os.sched_getaffinity(0)), len(missing))
    # disable=None: silent where standard error is no terminal
    with tqdm(
        desc="text to tokens", total=total, unit="B", unit_scale=True, leave=False, disable=None if progress else True
    ) as bar:
        for part in _done(missing, encoder, folder, workers if total >= PROCESSES_FROM else 1):
            bar.update(int(part.sizes.sum()))


def _done(parts: list[Part], encoder: Encoder, folder: Path, workers: int) -> Iterator[Part]:
    if workers <= 1:
        for part in parts:
            encoder.encode(part)
            yield part
        return
    # Spawned: a process with JAX in it has threads and must not be forked.
    context = multiprocessing.get_context("spawn")
    arguments = (folder, encoder.end_of_document, encoder.marks)
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=arguments) as pool:
        try:
            futures = {pool.submit(_encode, part): part for part in parts}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_encoder: Encoder | None = None  # of a worker process


def _start(folder: Path, end_of_document: bool, marks: Marks | None) -> None:
    global _encoder
    _encoder = Encoder(load_tokenizer(folder), end_of_document, marks)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A pool's workers outlive a parent that was killed, waiting for work.
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _encode(part: Part) -> None:
    assert _encoder is not None
    _encoder.encode(part)
