"""What a source gives: documents, each with what decides its side of the split and, for a teacher, its judgement."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Document(NamedTuple):
    """One text, or one proposition of a teacher."""

    text: str
    key: str | None = None  # documents of one key are on one side of the split, in all sources; None: the text is it
    judgement: bool | None = None  # whether the proposition is true; None: a text, not a proposition
    split: str | None = None  # "train" or "validation" where the source has splits of its own; None: the key's hash


@dataclasses.dataclass(frozen=True)
class Source:
    """A named stream of documents.

    `read` gives the documents, always in the same order. `stamp` is a text that changes when the documents may have
    (files, their sizes and times): what a killed preparation has read of a source is kept only if it is the same.
    None: cannot be known, read again.
    """

    name: str
    read: Callable[[], Iterator[Document | str]]
    is_teacher: bool = False
    stamp: str | None = None


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether a key (a document's text in UTF-8, if it has none) is for validation: its sha256, read as a number in
    [0, 1), is below `fraction`."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) < fraction * 2**64
