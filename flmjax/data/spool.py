"""Documents of a source on disk, divided into training and validation, so that processes can read them in parallel."""

import array
import dataclasses
import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flmjax.config import ConfigError
from flmjax.data.sources.documents import Document, as_document, is_held_out, key_bytes

SPLITS = ("train", "validation")
NO_JUDGEMENT = 2  # a text; 1 is a true proposition, 0 a false one


@dataclasses.dataclass(frozen=True)
class Spooled:
    """The D documents of a source and split.

    Attributes:
        path: file of their texts in UTF-8, one after another.
        sizes: bytes of each document, int64 (D,).
        judgements: 1 true, 0 false, NO_JUDGEMENT for a text, uint8 (D,).
        hashes: of the texts, uint64 (D,). Documents with equal hashes count as equal.
    """

    path: Path
    sizes: np.ndarray
    judgements: np.ndarray
    hashes: np.ndarray

    def read(self) -> Iterator[str]:
        """The texts, in order."""
        with self.path.open("rb") as file:
            for size in self.sizes:
                yield file.read(size).decode("utf-8")


class Spool:
    """The documents of a source, stored in a folder.

    Attributes:
        slug: the source's name in file names.
        splits: the documents of each split; empty until `fill` or `reload`.
        left_out: number of documents that are only white space; 0 until then.
    """

    def __init__(self, folder: Path, slug: str):
        self.slug = slug
        self.splits: dict[str, Spooled] = {}
        self.left_out = 0
        self._columns_path = folder / f"{slug}.columns.npz"
        self._paths = {split: folder / f"{slug}-{split}.text" for split in SPLITS}

    def fill(self, documents: Iterable[Document | str], source: str, fraction: float, is_teacher: bool) -> None:
        """Store every document that is not only white space, in the split that it names or that its key decides.

        Args:
            source: its name, for messages.
            fraction: of the documents, held out by the hash of their key.
            is_teacher: whether all documents must be propositions; else all must be texts.

        Raises:
            ConfigError: for a document that is no `str` or holds a lone surrogate, for a proposition in a source of
                texts, and for a text in a teacher; names source and document.
        """
        self.forget()
        left_out = 0
        columns = {split: (array.array("q"), array.array("B"), array.array("Q")) for split in SPLITS}
        with self._paths["train"].open("wb") as train, self._paths["validation"].open("wb") as validation:
            files = {"train": train, "validation": validation}
            for i, document in enumerate(map(as_document, documents)):
                raw = _encoded(document.text, i, source)
                if (document.judgement is not None) != is_teacher:
                    kind = "a text" if is_teacher else "a proposition with a judgement"
                    raise ConfigError(f"document {i} of '{source}' is {kind}; texts and teachers are sources apart")
                if not raw.strip():
                    left_out += 1
                    continue
                text_hash = hashlib.sha256(raw).digest()
                key = raw if document.key is None else key_bytes(document.key)
                split = document.split or ("validation" if is_held_out(key, fraction) else "train")
                files[split].write(raw)
                sizes, judgements, hashes = columns[split]
                sizes.append(len(raw))
                judgements.append(NO_JUDGEMENT if document.judgement is None else document.judgement)
                hashes.append(int.from_bytes(text_hash[:8]))
        named = {
            f"{split}-{name}": np.asarray(column)
            for split in SPLITS
            for name, column in zip(("sizes", "judgements", "hashes"), columns[split], strict=True)
        }
        partial = self._columns_path.with_suffix(".tmp.npz")
        np.savez(partial, allow_pickle=False, left_out=left_out, **named)
        os.replace(partial, self._columns_path)  # `reload` finds the spool from this moment on
        self.reload()

    def reload(self) -> bool:
        """Load the documents that an earlier process stored; False if that process did not finish."""
        try:
            with np.load(self._columns_path) as columns:
                self.left_out = int(columns["left_out"])
                self.splits = {
                    split: Spooled(path, *(columns[f"{split}-{c}"] for c in ("sizes", "judgements", "hashes")))
                    for split, path in self._paths.items()
                }
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        return all(s.path.exists() and s.path.stat().st_size == s.sizes.sum() for s in self.splits.values())

    def forget(self) -> None:
        """Make `reload` return False."""
        self._columns_path.unlink(missing_ok=True)

    def duplicates(self) -> int:
        """Number of documents that are equal to an earlier document of the source."""
        hashes = np.concatenate([spooled.hashes for spooled in self.splits.values()])
        return len(hashes) - len(np.unique(hashes))

    def delete(self) -> None:
        """Remove the files of the spool."""
        for path in (*self._paths.values(), self._columns_path):
            path.unlink()


def slugs(sources: Iterable[str]) -> list[str]:
    """Names of the sources in file names: letters and digits, and a hash if the name has other characters."""
    names = []
    for source in sources:
        plain = re.sub(r"[^a-z0-9_]", "-", source.lower()).strip("-")[-40:]
        names.append(plain if plain == source else f"{plain}-{hashlib.sha256(key_bytes(source)).hexdigest()[:8]}")
    return names


def _encoded(text: object, index: int, source: str) -> bytes:
    if not isinstance(text, str):
        raise ConfigError(f"document {index} of '{source}' is of type {type(text).__name__}, not str")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ConfigError(
            f"document {index} of '{source}' holds U+{code:04X} at character {error.start}, half of a surrogate pair, "
            "which is no text"
        ) from None
