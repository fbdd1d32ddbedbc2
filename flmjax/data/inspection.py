"""Prepared data for a reader: counts of every source, and decoded rows that show which tokens are in the loss."""

import bisect
import itertools
from collections.abc import Iterator

import numpy as np

from flmjax.data.batch import Batch
from flmjax.data.loader import TrainingStream
from flmjax.data.mixture import ENDLESS
from flmjax.data.prepared import data_warnings
from flmjax.data.spool import SPLITS
from flmjax.data.tokenizers import Tokenizer
from flmjax.text_table import printable, text_table

NO_LOSS = ("⟦", "⟧")  # around text that is not in the loss
FAINT = ("\x1b[2m", "\x1b[0m")


def summary(stream: TrainingStream) -> str:
    """A table of the sources: documents, tokens, bytes per token, share of the first stage's samples, duplicates."""
    prepared, weights = stream.prepared, stream.schedule[0].mixture_weights
    rows = [("source", "split", "documents", "tokens", "bytes", "bytes/token", "share", "duplicates")]
    for source, weight in zip(prepared.sources, weights, strict=True):
        counts = prepared.meta["sources"][source]
        for split in SPLITS:
            c = counts[split]
            first = split == SPLITS[0]
            rows.append(
                (
                    (source + " (teacher)" * prepared.is_teacher(source)) if first else "",
                    split,
                    f"{c['documents']:,}",
                    f"{c['tokens']:,}",
                    f"{c['bytes']:,}",
                    f"{c['bytes'] / max(c['tokens'], 1):.2f}",
                    f"{weight / sum(weights):.1%}" if first else "",
                    f"{counts.get('duplicates', 0):,}" if first else "",
                )
            )
    tokenizer = prepared.tokenizer
    notes = [
        f"{prepared.directory}: vocabulary of {tokenizer.vocab_size:,} ids, id {tokenizer.end_id} ends a document; "
        f"{prepared.meta.get('duplicates', 0):,} documents repeat another one, "
        f"{prepared.meta.get('held_out_in_training', 0):,} held-out texts are also in the training text"
    ]
    for source in prepared.sources:
        if left_out := prepared.meta["sources"][source].get("files_left_out"):
            count = prepared.meta["sources"][source]["files"]
            labels = ", ".join(f"{number} {label}" for label, number in left_out.items())
            notes.append(f"{source}: {count:,} files; left out: {labels}")
        if count := prepared.meta["sources"][source].get("documents_left_out"):
            reason = "without text or usable label" if prepared.is_teacher(source) else "without text"
            notes.append(f"{source}: {count:,} documents {reason} are left out")
    if prepared.marks is not None:
        spelled = [f"{tokenizer.decode(ids)} {list(ids)}" for ids in (prepared.marks.true, prepared.marks.false)]
        place = prepared.marks.differs + 1
        notes.append(f"marks: true {spelled[0]}, false {spelled[1]}; token {place} decides")
    notes += data_warnings(prepared.meta["sources"], stream.length)
    return "\n".join([*notes, text_table(rows, left=2)])


def show_row(row: Batch, tokenizer: Tokenizer, terminal: bool = False) -> str:
    """The text of every segment of a sample, with ends of documents and padding.

    Args:
        terminal: True: text that is not in the loss is faint. False: it stands between the brackets NO_LOSS.
    """
    in_loss = row["weights"] > 0
    if "segment_ids" in row:
        segment_ids = row["segment_ids"]
    else:  # padding is the end of the row that has no weight
        segment_ids = (np.arange(len(in_loss)) <= np.flatnonzero(in_loss)[-1]).astype(np.int32)
    lines = [f"{int((segment_ids > 0).sum())} tokens, {int(in_loss.sum())} in the loss"]
    for segment in range(1, int(segment_ids.max()) + 1):
        places = np.flatnonzero(segment_ids == segment)
        targets = places if in_loss[places[-1]] else places[:-1]  # the last target may belong to the next document
        ids = [int(row["tokens"][places[0]]), *(int(i) for i in row["targets"][targets])]
        counts = [bool(c) for c in in_loss[targets]]
        counts = [counts[0] if counts else False, *counts]  # the first token is no target: shown like the second
        lines.append(f"[segment {segment}] " + "".join(_pieces(ids, counts, tokenizer, FAINT if terminal else NO_LOSS)))
    padding = int((segment_ids == 0).sum())
    return "\n".join(lines + [f"[{padding} padding]"] * (padding > 0))


def _pieces(ids: list[int], counts: list[bool], tokenizer: Tokenizer, no_loss: tuple[str, str]) -> Iterator[str]:
    start = 0
    for i in range(1, len(ids) + 1):
        is_end = ids[i - 1] == tokenizer.end_id
        if i == len(ids) or counts[i] != counts[start] or is_end:
            text = printable(tokenizer.decode(ids[start : i - is_end])) + "<end>" * is_end
            yield text if counts[start] else no_loss[0] + text + no_loss[1]
            start = i


def inspected_samples(stream: TrainingStream, count: int) -> list[int]:
    """Numbers of `count` samples: the first sample of every source that has one, then the first others."""
    firsts = set()
    for i in range(len(stream.prepared.sources)):
        samples_of_source = lambda end, i=i: stream.source_samples(0, end)[i]
        if samples_of_source(ENDLESS):
            firsts.add(bisect.bisect_left(range(ENDLESS), 1, key=samples_of_source) - 1)
    others = (n for n in itertools.count() if n not in firsts)
    return sorted([*sorted(firsts), *itertools.islice(others, max(count - len(firsts), 0))][:count])


def show_samples(stream: TrainingStream, count: int, terminal: bool = False) -> Iterator[str]:
    """The text of `count` samples of the training stream: the first of each source, then the first others."""
    for n in inspected_samples(stream, count):
        row = stream.samples[n]
        kind = "teacher" if "marks" in row and row["marks"].any() else "text"
        yield f"--- sample {n}, {kind}: {show_row(row, stream.prepared.tokenizer, terminal)}"
