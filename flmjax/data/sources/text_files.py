"""Text files as documents: plain or JSON lines, also as .gz or .xz; one file, a folder or a glob."""

import glob
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from flmjax.config import ConfigError, nearest
from flmjax.data.sources.documents import Document

SUFFIXES = (".txt", ".md", ".jsonl")  # what a folder is searched for, plain or compressed
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


class Files(NamedTuple):
    """Files of a source, sorted, and the folder that their paths are relative to."""

    paths: list[Path]
    root: Path


def find(source: str, names: Iterable[str], field: str = "data.sources") -> Files:
    """The files that `source` means: a file, a folder (searched recursively for SUFFIXES), or a glob.

    `names` are the built-in sources, for the message about a word that is neither; `field` is for it too.

    Raises:
        ConfigError: when there is no such file, or none in the folder or of the pattern.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise ConfigError(f"{field}: '{source}': {error}") from None
    if path.is_file():
        return Files([path], path.parent)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and _plain_name(p).endswith(SUFFIXES)]
        if not files:
            raise ConfigError(f"{field}: folder '{source}' holds no {' or '.join(SUFFIXES)} file (nor .gz, .xz)")
        return Files(sorted(files), path)
    if glob.has_magic(source):
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not files:
            raise ConfigError(f"{field}: no file matches '{source}'")
        return Files(sorted(files), next(p for p in path.parents if not glob.has_magic(str(p))))
    if "/" in source or "." in source:
        raise ConfigError(f"{field}: no file or folder '{source}'")
    raise ConfigError(f"{field}: '{source}' is neither a built-in source nor a path{nearest(source, names)}")


def stamp(files: Files) -> str:
    """sha256 (hex) of the files' paths, sizes and times of change."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files.paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def documents(files: Files, path_is_key: bool = False) -> Iterator[Document]:
    """The documents of `files`, one after another.

    What ends a document depends on the (uncompressed) name of its file:
        *.docs.txt: a blank line;
        *.md: nothing, the file is one document;
        *.jsonl: the line; it is an object with "text", or with "instruction", perhaps "input", and "output", which
            become three paragraphs; a "key" decides the side of the split;
        all others: two or more blank lines (a paragraph break is none).
    Blank lines around a document are no part of it; the rest is kept as it is. A file is read line by line.

    Raises:
        ConfigError: naming the file, and the byte where it is not UTF-8 (counted after decompression) or the line
            that is no such object.
    """
    for path in files.paths:
        name = _plain_name(path)
        key = str(path.relative_to(files.root)) if path_is_key else None
        if name.endswith(".jsonl"):
            for where, row in json_lines(Files([path], files.root)):
                default = key and where.replace(str(path), key)  # a line is a page of its own
                yield Document(_row_text(row, where), row_key(row, where, default))
            continue
        blank_lines = 1 if name.endswith(".docs.txt") else None if name.endswith(".md") else 2
        for text in _split(_lines(path), blank_lines):
            yield Document(text, key)


def json_lines(files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of every line of `files` that is not blank.

    Raises:
        ConfigError: naming file and line that is no JSON object, or the byte that is no UTF-8.
    """
    for path in files.paths:
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{path}: line {number} holds half of a surrogate pair, no text: {error}") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: line {number} is no JSON object but {line.strip()[:40]!r}")
            yield f"{path}: line {number}", row


def row_key(row: dict[str, Any], where: str, default: str | None) -> str | None:
    """The text of a line's "key"; `default` where it has none.

    Raises:
        ConfigError: naming the line whose key is no text.
    """
    key = row.get("key")
    if key is not None and not isinstance(key, str):
        raise ConfigError(f'{where}: its "key" is {key!r}, but must be a text')
    return default if key is None else key


def _row_text(row: dict[str, Any], where: str) -> str:
    if isinstance(row.get("text"), str):
        return row["text"]
    parts = row.get("instruction"), row.get("input") or "", row.get("output")
    if all(isinstance(part, str) for part in parts):
        return "\n\n".join(part for part in parts if part)
    raise ConfigError(f'{where} has neither "text" nor "instruction" and "output"; it has: {", ".join(row)}')


def _plain_name(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in _OPEN else name


def _lines(path: Path) -> Iterator[str]:
    opener = _OPEN.get(path.suffix.lower(), open)
    try:
        with cast(BinaryIO, opener(path, "rb")) as file:
            yield from _decoded(file, path)
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path}: not a whole {path.suffix} file: {error}") from error


def _decoded(file: BinaryIO, path: Path) -> Iterator[str]:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")  # other ends of a line are text like any other
    try:
        yield from lines
    except UnicodeDecodeError:
        file.seek(0)
        raise ConfigError(f"{path}: not UTF-8 at {_first_bad_byte(file)}; convert the file") from None


def _first_bad_byte(file: BinaryIO) -> str:
    offset = 0
    for raw in file:  # the byte 0x0A is never a part of another character in UTF-8
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"byte {offset + error.start} (0x{raw[error.start]:02X})"
        offset += len(raw)
    raise AssertionError("all of the file is UTF-8")


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
