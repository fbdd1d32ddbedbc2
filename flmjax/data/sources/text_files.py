"""Text files as documents: plain text, Markdown and JSON lines, also compressed; a file, a folder or a glob."""

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

SUFFIXES = (".txt", ".md", ".jsonl")  # of the files that are read from a folder, plain or compressed
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


class Files(NamedTuple):
    """The files of a source.

    Attributes:
        paths: sorted.
        root: the folder that keys and ids give the paths relative to.
    """

    paths: list[Path]
    root: Path


def find(source: str, names: Iterable[str], field: str = "data.sources") -> Files:
    """The files of a file's name, a folder (searched recursively for SUFFIXES) or a glob.

    Args:
        names: built-in sources; an error message suggests the nearest ones.
        field: the setting that error messages name.

    Raises:
        ConfigError: if the path does not exist, or no file is in the folder or matches the glob.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~name, where no user has that name
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
    """sha256 (hexadecimal) of the paths, sizes and modification times of the files."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files.paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def documents(files: Files, path_is_key: bool = False) -> Iterator[Document]:
    """The documents of `files`, one after another.

    The name of a file, without .gz or .xz, says where its documents end:
        *.docs.txt: at a blank line;
        *.md: at the end of the file, which is one document;
        *.jsonl: at the end of the line. A line is an object with "text", or with "instruction", "output" and
            optionally "input", which become paragraphs; "key" (optional) is the document's key;
        all others: at two or more blank lines, so that a document may have paragraphs.
    Blank lines before and after a document are removed; its text is not changed otherwise. Files are read line by line.

    Args:
        path_is_key: True: a document without a key has the file's path below files.root as its key.

    Raises:
        ConfigError: naming the file, and the byte where it is not UTF-8 (counted after decompression), or the line
            that is no such object.
    """
    for path in files.paths:
        name = _plain_name(path)
        key = str(path.relative_to(files.root)) if path_is_key else None
        if name.endswith(".jsonl"):
            for place, record in json_lines(Files([path], files.root)):
                default = key and place.replace(str(path), key)  # every line has a key of its file and number
                yield Document(_text_of(record, place), key_of(record, place, default))
            continue
        blank_lines = 1 if name.endswith(".docs.txt") else None if name.endswith(".md") else 2
        for text in _split(_lines(path), blank_lines):
            yield Document(text, key)


def json_lines(files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs (place, record) of the lines that are not blank: "FILE: line NUMBER", and the JSON object of the line.

    Raises:
        ConfigError: naming the file and the line that is no JSON object, or the byte that is no UTF-8.
    """
    for path in files.paths:
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{path}: line {number} holds half of a surrogate pair, no text: {error}") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ConfigError(f"{path}: line {number} is no JSON object but {line.strip()[:40]!r}")
            yield f"{path}: line {number}", record


def key_of(record: dict[str, Any], place: str, default: str | None) -> str | None:
    """The "key" of a JSON line; `default` if the line has no key.

    Raises:
        ConfigError: naming the line whose key is no text.
    """
    key = record.get("key")
    if key is not None and not isinstance(key, str):
        raise ConfigError(f'{place}: its "key" is {key!r}, but must be a text')
    return default if key is None else key


def _text_of(record: dict[str, Any], place: str) -> str:
    if isinstance(record.get("text"), str):
        return record["text"]
    paragraphs = record.get("instruction"), record.get("input") or "", record.get("output")
    if all(isinstance(paragraph, str) for paragraph in paragraphs):
        return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    raise ConfigError(f'{place} has neither "text" nor "instruction" and "output"; it has: {", ".join(record)}')


def _plain_name(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in _OPEN else name


def _lines(path: Path) -> Iterator[str]:
    opener = _OPEN.get(path.suffix.lower(), open)
    try:
        with cast(BinaryIO, opener(path, "rb")) as file:
            yield from _decoded(file, path)
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path}: not a complete {path.suffix} file: {error}") from error


def _decoded(file: BinaryIO, path: Path) -> Iterator[str]:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")  # carriage returns stay in the text
    try:
        yield from lines
    except UnicodeDecodeError:
        file.seek(0)
        raise ConfigError(f"{path}: not UTF-8 at {_first_bad_byte(file)}; convert the file") from None


def _first_bad_byte(file: BinaryIO) -> str:
    offset = 0
    for raw in file:  # in UTF-8 the byte 0x0A occurs in no character but the line break
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"byte {offset + error.start} (0x{raw[error.start]:02X})"
        offset += len(raw)
    raise AssertionError("every line of the file is UTF-8")


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
