"""Prepared data as a person reads it: counts of every source, and rows decoded with what the loss sees of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flmjax.data.prepared import Prepared
from flmjax.data.spool import SPLITS
from flmjax.data.tokenizers import Tokenizer
from flmjax.text_table import text_table

NO_LOSS = ("⟦", "⟧")  # around text that is no target of the loss
FAINT = ("\x1b[2m", "\x1b[0m")


def summary(prepared: Prepared, weights: Sequence[float]) -> str:
    """A table of the sources: documents, tokens, bytes a token, share of the samples, equal documents."""
    rows = [("source", "split", "documents", "tokens", "bytes", "bytes/token", "of samples", "duplicates")]
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
        f"{prepared.directory}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.end_id}, "
        f"{prepared.meta.get('duplicates', 0):,} equal documents in all sources together, "
        f"{prepared.meta.get('held_out_in_training', 0):,} held-out texts also in training"
    ]
    if prepared.marks is not None:
        spelled = [f"{tokenizer.decode(ids)} {list(ids)}" for ids in (prepared.marks.true, prepared.marks.false)]
        notes.append(f"marks: true {spelled[0]}, false {spelled[1]}; token {prepared.marks.differs + 1} decides")
    return "\n".join([*notes, text_table(rows, left=2)])


def show_row(row: dict[str, np.ndarray], tokenizer: Tokenizer, terminal: bool = False) -> str:
    """A row of the loader: every segment's text, ends of documents, what is not in the loss, padding.

    `terminal`: text without loss is faint there, else it stands between NO_LOSS.
    """
    real = row["weights"] > 0
    if "segment_ids" in row:
        segments = row["segment_ids"]
    else:  # the padding is what has no weight at the end
        segments = (np.arange(len(real)) <= np.flatnonzero(real)[-1]).astype(np.int32)
    lines = [f"{int((segments > 0).sum())} tokens, {int(real.sum())} in the loss"]
    for segment in range(1, int(segments.max()) + 1):
        places = np.flatnonzero(segments == segment)
        targets = places if real[places[-1]] else places[:-1]  # a border's target belongs to the next document
        ids = [int(row["tokens"][places[0]]), *(int(i) for i in row["targets"][targets])]
        counts = [bool(c) for c in real[targets]]
        counts = [counts[0] if counts else False, *counts]  # the first token is no target: shown like the second
        lines.append(f"[segment {segment}] " + "".join(_pieces(ids, counts, tokenizer, FAINT if terminal else NO_LOSS)))
    padding = int((segments == 0).sum())
    return "\n".join(lines + [f"[{padding} padding]"] * (padding > 0))


def _pieces(ids: list[int], counts: list[bool], tokenizer: Tokenizer, no_loss: tuple[str, str]) -> Iterator[str]:
    start = 0
    for i in range(1, len(ids) + 1):
        ends_here = ids[i - 1] == tokenizer.end_id
        if i == len(ids) or counts[i] != counts[start] or ends_here:
            text = tokenizer.decode(ids[start : i - ends_here]) + "<end>" * ends_here
            yield text if counts[start] else no_loss[0] + text + no_loss[1]
            start = i


def show_samples(dataset: Any, prepared: Prepared, count: int, terminal: bool = False) -> Iterator[str]:
    """The first `count` samples of the training stream."""
    for n in range(count):
        row = dataset[n]
        kind = "teacher" if row.get("marks", np.zeros(2)).any() else "text"
        yield f"--- sample {n}, {kind}: {show_row(row, prepared.tokenizer, terminal)}"
