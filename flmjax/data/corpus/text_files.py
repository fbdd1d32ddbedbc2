"""Text files as documents: plain, .gz or .xz; one file, a folder or a glob."""

import glob
import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from flmjax.config import ConfigError, nearest

SUFFIXES = (".txt", ".md")  # what a folder is searched for, plain or compressed
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


def find(source: str, names: Iterable[str]) -> list[Path]:
    """The files that `source` means, sorted: a file, a folder (searched recursively for .txt and .md), or a glob.

    `names` are the built-in sources, for the message about a word that is neither.

    Raises:
        ConfigError: when there is no such file, or none in the folder or of the pattern.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and _plain_name(p).endswith(SUFFIXES)]
        if not files:
            raise ConfigError(f"data.sources: folder '{source}' holds no {' or '.join(SUFFIXES)} file (nor .gz, .xz)")
        return sorted(files)
    if glob.has_magic(source):
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not files:
            raise ConfigError(f"data.sources: no file matches '{source}'")
        return sorted(files)
    if "/" in source or "." in source:
        raise ConfigError(f"data.sources: no file or folder '{source}'")
    raise ConfigError(f"data.sources: '{source}' is neither a built-in source nor a path{nearest(source, names)}")


def documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of `files`, one after another.

    What ends a document depends on the (uncompressed) name of its file:
        *.docs.txt: a blank line;
        *.md: nothing, the file is one document;
        all others: two or more blank lines (a paragraph break is none).
    Blank lines around a document are no part of it; the rest is kept as it is. A file is read line by line.

    Raises:
        ConfigError: naming the file, and the byte where it is not UTF-8 (counted after decompression).
    """
    for path in files:
        name = _plain_name(path)
        blank_lines = 1 if name.endswith(".docs.txt") else None if name.endswith(".md") else 2
        opener = _OPEN.get(path.suffix.lower(), open)
        try:
            with cast(BinaryIO, opener(path, "rb")) as file:
                yield from _split(_lines(file, path), blank_lines)
        except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{path}: not a whole {path.suffix} file: {error}") from error


def _plain_name(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in _OPEN else name


def _lines(file: BinaryIO, path: Path) -> Iterator[str]:
    offset = 0
    for raw in file:  # the byte 0x0A is never a part of another character in UTF-8
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = offset + error.start
            raise ConfigError(f"{path}: not UTF-8 at byte {at} (0x{raw[error.start]:02X}); convert the file") from None
        yield line.removeprefix("\ufeff") if offset == 0 else line
        offset += len(raw)


def _split(lines: Iterable[str], blank_lines: int | None) -> Iterator[str]:
    document: list[str] = []
    blank = 0
    for line in lines:
        if line.strip():
            blank = 0
            document.append(line)
            continue
        blank += 1
        if blank == blank_lines:
            yield from _joined(document)
            document = []
        elif document:
            document.append(line)
    yield from _joined(document)


def _joined(document: list[str]) -> Iterator[str]:
    while document and not document[-1].strip():
        document.pop()
    if document:
        yield "".join(document).removesuffix("\n").removesuffix("\r")
