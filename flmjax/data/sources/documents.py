"""`Document` and `Source`: what every source yields, and the rule that holds documents out for validation."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flmjax.data.sources.files import Files


class Document(NamedTuple):
    """One text, or one proposition of a teacher.

    Attributes:
        text: the text; of a proposition, all of it but the mark that judges it.
        key: documents with equal keys go to the same split, in all sources. None: the text is the key.
        judgement: whether the proposition is true. None: the document is a text.
        split: "train" or "validation", where the source says so itself. None: the hash of the key decides.
    """

    text: str
    key: str | None = None
    judgement: bool | None = None
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A named stream of documents.

    Attributes:
        name: the entry of data.sources or data.teachers, or the name of the seqio Task.
        read: yields the documents from the first, in the same order at every call. A `str` is a Document with defaults.
        is_teacher: True if all documents are propositions, False if all are texts.
        stamp: changes when the documents may have changed (paths, sizes and times of files). A preparation that was
            interrupted keeps the text of a source whose stamp is the same. None: unknown, so the source is read again.
        files: the files that are read and those that are left out; None for a source that is no files.
    """

    name: str
    read: Callable[[], Iterator[Document | str]]
    is_teacher: bool = False
    stamp: str | None = None
    files: Files | None = None


def as_document(document: Document | str) -> Document:
    """A text as a Document; a Document as it is."""
    return document if isinstance(document, Document) else Document(document)


def key_bytes(key: str) -> bytes:
    """A key in UTF-8; a surrogate that stands for a byte of a file's name (PEP 383) is that byte."""
    return key.encode("utf-8", "surrogateescape")


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether documents with this key (UTF-8) are held out for validation.

    They are if the first 64 bits of the key's sha256, read as a number in [0, 1), are below `fraction`.
    """
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) < fraction * 2**64
