"""Text of one source on disk, split into training and validation, so that it can be read twice."""

import array
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from flmjax.config import ConfigError

SPLITS = ("train", "validation")


class Spool:
    """The documents of a source as two files of UTF-8, with `sizes` (bytes per document) by split."""

    def __init__(self, folder: Path, slug: str):
        self.slug = slug
        self.sizes = {split: array.array("Q") for split in SPLITS}
        self._paths = {split: folder / f"{slug}-{split}.text" for split in SPLITS}

    def fill(self, documents: Iterable[str], source: str, validation_fraction: float) -> None:
        """Store every document that is not white space, on the side that its hash says.

        Raises:
            ConfigError: for a document that is no str or holds a lone surrogate; names source and document.
        """
        with self._paths["train"].open("wb") as train, self._paths["validation"].open("wb") as validation:
            files = {"train": train, "validation": validation}
            for i, text in enumerate(documents):
                if not isinstance(text, str):
                    raise ConfigError(
                        f"data.sources: document {i} of '{source}' is of type {type(text).__name__}, not str"
                    )
                if not text.strip():
                    continue
                try:
                    raw = text.encode("utf-8")
                except UnicodeEncodeError as error:
                    code = ord(text[error.start])
                    raise ConfigError(
                        f"data.sources: document {i} of '{source}' holds U+{code:04X} at character {error.start}, "
                        f"half of a surrogate pair, which is no text"
                    ) from None
                split = "validation" if is_held_out(raw, validation_fraction) else "train"
                files[split].write(raw)
                self.sizes[split].append(len(raw))

    def read(self, split: str) -> Iterator[str]:
        """The documents of a split, in order."""
        with self._paths[split].open("rb") as file:
            for size in self.sizes[split]:
                yield file.read(size).decode("utf-8")

    def delete(self) -> None:
        """Remove the files."""
        for path in self._paths.values():
            path.unlink()


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document, as UTF-8, belongs to validation: its sha256, read as a number in [0, 1), is below it."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) < fraction * 2**64
