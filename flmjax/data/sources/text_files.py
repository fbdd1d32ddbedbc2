"""Text files as documents: plain text, Markdown and JSON records, also compressed."""

import codecs
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flmjax.config import ConfigError
from flmjax.data.sources.compression import opened
from flmjax.data.sources.documents import Document
from flmjax.data.sources.files import RECORD_SUFFIXES, Files, format_of, uncompressed_name

MAX_DOCUMENT_BYTES = 64 << 20  # of a document, and of a line or a record of JSON; it is read at once
BLOCK = 1 << 20  # bytes of a file of JSON that are read at once
BLANK_LINES = re.compile(r"\n\s*\n")  # between paragraphs; a carriage return before a line's end is white space
_SEPARATORS = re.compile(r"[\s,]*")
_NUL = "holds a NUL character, as UTF-16 and binary files do; convert the file to UTF-8, or leave it out"
_TOO_LONG = f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"


def documents(files: Files, path_is_key: bool = False) -> Iterator[Document]:
    """The documents of `files`, one after another.

    The name of a file, without the suffix of a compression, says where its documents end:
        *.docs.txt: at a blank line;
        *.md: at the end of the file, which is one document;
        *.jsonl, *.ndjson: at the end of the line;
        *.json: at the end of the line, or of a record of an array;
        all others: at two or more blank lines, so that a document may have paragraphs.
    A record of JSON is an object with "text", or with "instruction", "output" and optionally "input", which become
    paragraphs; "key" (optional) is the document's key. A field that is null is missing. Blank lines before and after a
    document are removed; its text is not changed otherwise. Files are read line by line.

    Args:
        path_is_key: True: a document without a key has the file's key (Files.key), a record also its number.

    Raises:
        ConfigError: naming the file, and the byte where it is not UTF-8 (counted after decompression); the line or the
            record that holds a NUL character, as UTF-16 does, or that is no such object; the line of a document of more
            than MAX_DOCUMENT_BYTES; or a file of JSON records whose suffix is that of plain text.
    """
    for path in files.paths:
        key = files.key(path) if path_is_key else None
        if format_of(path) in RECORD_SUFFIXES:
            for number, record in _records(path):
                place = f"{path}: {number}"
                yield Document(_text_of(record, place), key_of(record, place, key and f"{key}: {number}"))
            continue
        name = uncompressed_name(path).lower()
        blank_lines = 1 if name.endswith(".docs.txt") else None if name.endswith(".md") else 2
        for text in _split(_plain_lines(path), blank_lines, path):
            yield Document(text, key)


def json_records(files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs (place, record) of files of JSON: "FILE: line NUMBER" or "FILE: record NUMBER", and a JSON object.

    Raises:
        ConfigError: naming the file and the line or record that is no JSON object, or the byte that is no UTF-8.
    """
    for path in files.paths:
        for number, record in _records(path):
            yield f"{path}: {number}", record


def key_of(record: dict[str, Any], place: str, default: str | None) -> str | None:
    """The "key" of a JSON record in Unicode's normal form C; `default` if the record has no key.

    Raises:
        ConfigError: naming the record whose key is no text.
    """
    key = record.get("key")
    if key is not None and not isinstance(key, str):
        raise ConfigError(f'{place}: its "key" is {key!r}, but must be a text')
    return unicodedata.normalize("NFC", key) if key else default


def _text_of(record: dict[str, Any], place: str) -> str:
    """The document of a record: its "text", or its paragraphs. A field that is null is missing, other values count."""
    present = [name for name in ("text", "instruction", "input", "output") if record.get(name) is not None]
    names = ["text"] if "text" in present else present
    wrong = [f'"{name}" is {str(record[name])[:40]}, no text' for name in names if not isinstance(record[name], str)]
    if not wrong and (names == ["text"] or {"instruction", "output"} <= {*names}):
        return "\n\n".join(record[name] for name in names if record[name])
    fields = f'{place} has neither "text" nor "instruction" and "output"; it has: {", ".join(record)}'
    cure = "correct it, or leave the file out (the glob FOLDER/**/*.txt takes a part of a folder)"
    raise ConfigError("; ".join([fields, *wrong, cure]))


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs (number, record): "line 3" or "record 3", and a JSON object."""
    for number, value in _json_values(path) if _spans_lines(path) else _json_lines(path):
        place = f"{path}: {number}"
        try:
            raw = json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{place} holds half of a surrogate pair, no text: {error}") from None
        if b"\\u0000" in raw.replace(b"\\\\", b""):
            raise ConfigError(f"{place} holds a NUL character (\\u0000), which is no text; remove it")
        if not isinstance(value, dict):
            raise ConfigError(f"{place} is no JSON object but {json.dumps(value, ensure_ascii=False)[:40]}")
        yield number, value


def _spans_lines(path: Path) -> bool:
    """Whether a .json file holds an array, or an object that does not end in its first line."""
    if format_of(path) != ".json":
        return False
    start = next(_blocks(path), "").lstrip()
    first, line_break, _ = start.partition("\n")
    if start.startswith("[") or not line_break:
        return start.startswith("[")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return start.startswith("{")
    return False


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number} is not JSON: {error}") from None


def _json_values(path: Path) -> Iterator[tuple[str, object]]:
    """The items of a JSON array, or JSON values one after another; memory holds one of them and a block."""
    decode = json.JSONDecoder().raw_decode
    pieces: list[str] = []
    number, least = 1, 0  # number of the next record; characters that are read before it is tried again
    is_array = is_end = False
    for block in itertools.chain(_blocks(path), [""]):
        pieces.append(block)
        if block and sum(map(len, pieces)) < least:
            continue
        text, place = "".join(pieces), 0
        while True:
            place = _SEPARATORS.match(text, place).end()  # type: ignore[union-attr]
            if place == len(text):
                break
            if text[place] == "[" and number == 1 and not is_array:
                is_array, place = True, place + 1
            elif text[place] == "]" and is_array and not is_end:
                is_end, place = True, place + 1
            elif is_end:
                raise ConfigError(f"{path}: there is text after the array: {text[place : place + 40]!r}")
            else:
                try:
                    value, place = decode(text, place)
                except (ValueError, RecursionError) as error:
                    size = len(text) - place
                    if not block or _num_bytes(text[place:]) > MAX_DOCUMENT_BYTES:
                        raise ConfigError(f"{path}: record {number} is no JSON or {_TOO_LONG}: {error}") from None
                    least = min(2 * size, MAX_DOCUMENT_BYTES + 1)  # the rest of the record may not be read yet
                    break
                yield f"record {number}", value
                number, least = number + 1, 0
        pieces = [text[place:]]
    if is_array and not is_end:
        raise ConfigError(f"{path}: the array has no end after {number - 1} records")


# ---- text -----------------------------------------------------------------------------------------------------------


def _plain_lines(path: Path) -> Iterator[str]:
    """The lines of plain text; JSON records under a suffix of plain text are refused."""
    lines = _lines(path)
    for line in lines:
        if _is_record(line.strip()):
            raise ConfigError(
                f"{path}: its first line is a JSON record, but its suffix is '{format_of(path)}'; call it .jsonl "
                "(a record a line) or .json (an array), so that every record becomes a document"
            )
        yield line
        if line.strip():
            break
    yield from lines


def _is_record(line: str) -> bool:
    if not line.startswith(("{", "[")):
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(line.removeprefix("[").lstrip())
        _text_of(value, "")
    except (ValueError, RecursionError, AttributeError, TypeError):  # ConfigError is a ValueError
        return False
    return True


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _lines(path: Path) -> Iterator[str]:
    with opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")  # carriage returns stay in the text
        number = 0
        try:
            while line := text.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if _num_bytes(line) > MAX_DOCUMENT_BYTES:
                    raise ConfigError(f"{path}: line {number} is {_TOO_LONG}; divide it, or remove it")
                if "\0" in line:
                    raise ConfigError(f"{path}: line {number} {_NUL}")
                yield line
        except UnicodeDecodeError:
            for _ in _blocks(path):  # names the byte
                pass
            raise


def _blocks(path: Path) -> Iterator[str]:
    with opened(path) as file:
        yield from _decoded(iter(lambda: file.read(BLOCK), b""), path)


def _decoded(pieces: Iterable[bytes], path: Path) -> Iterator[str]:
    """Pieces of a file as text, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for piece in itertools.chain(pieces, [b""]):
        start = offset - len(decoder.getstate()[0])  # of a character that the piece before has begun
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            place, byte = start + error.start, error.object[error.start]
            raise ConfigError(f"{path}: not UTF-8 at byte {place} (0x{byte:02X}); convert the file") from None
        if (nul := text.find("\0")) >= 0:
            raise ConfigError(f"{path}: byte {start + len(text[:nul].encode())} {_NUL}")
        if text:
            yield text if offset else text.removeprefix("\ufeff")
        offset += len(piece)


def _split(lines: Iterable[str], blank_lines: int | None, path: Path) -> Iterator[str]:
    document: list[str] = []
    blank = size = first = 0
    for number, line in enumerate(lines, start=1):
        is_blank = not line.strip()
        blank = blank + 1 if is_blank else 0
        if blank_lines is not None and blank == blank_lines:
            yield from _joined(document)
            document, size = [], 0
        elif document or not is_blank:
            first = first if document else number
            document.append(line)
            size += _num_bytes(line)
            if size > MAX_DOCUMENT_BYTES:
                ends = {1: "a blank line", 2: "two blank lines"}.get(blank_lines or 0, "the end of the file")
                raise ConfigError(
                    f"{path}: the document at line {first} is {_TOO_LONG}; divide it into documents (in this file "
                    f"{ends} ends one)"
                )
    yield from _joined(document)


def _joined(document: list[str]) -> Iterator[str]:
    while document and not document[-1].strip():
        document.pop()
    if document:
        yield "".join(document).removesuffix("\n").removesuffix("\r")
