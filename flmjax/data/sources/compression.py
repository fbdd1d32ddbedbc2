"""Compressed files: gzip, xz and bzip2 of the standard library, Zstandard where Python or a package has it."""

import bz2
import contextlib
import functools
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol, cast

from flmjax.config import ConfigError

# Compressed bytes that are read at once. zstandard cannot limit the text of a piece: 128 blocks of 4 bytes, each of at
# most 128 KiB of text, are 16 MiB.
_PIECE = 512
_TEXT = 1 << 20  # bytes of text that a piece gives at once, where that can be limited


class _Frame(Protocol):
    """A decompressor of one frame, as those of bz2 and lzma."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _ZstandardFrame:
    """A frame by the package zstandard."""

    needs_input = True

    def __init__(self, zstandard: ModuleType):
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        """Bytes after the frame."""
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """The text of some bytes; `max_length` is not kept."""
        return self._frame.decompress(data)


class _Frames(io.RawIOBase):
    """The text of all frames of a file.

    The files of bz2, lzma and zstandard take a damaged frame after the first one, or a cut one, for the end.
    """

    def __init__(self, path: Path, new_frame: Callable[[], _Frame]):
        self._file = path.open("rb")
        self._new_frame = new_frame
        self._frame: _Frame | None = None  # None between frames
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; returns the number of bytes, 0 at the end of the file."""
        while not self._text:
            compressed = b""
            if self._frame is None or self._frame.needs_input:
                compressed = self._compressed or self._file.read(_PIECE)
                self._compressed = b""
                if not compressed and self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                if not compressed:
                    return 0
            if self._frame is None:
                compressed = compressed.lstrip(b"\0")  # padding
                if not compressed:
                    continue
                self._frame = self._new_frame()
            self._text = memoryview(self._frame.decompress(compressed, _TEXT))
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _zstd() -> ModuleType | None:
    """Python's module (3.14), else the package; None without them."""
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def _zstd_frame() -> _Frame:
    module = _zstd()
    assert module is not None, "check_compressions refuses the file"
    return _ZstandardFrame(module) if module.__name__ == "zstandard" else module.ZstdDecompressor()


def _frames(new_frame: Callable[[], _Frame], path: Path, mode: str) -> io.BufferedReader:
    return io.BufferedReader(_Frames(path, new_frame))


COMPRESSIONS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".xz": functools.partial(_frames, lzma.LZMADecompressor),
    ".bz2": functools.partial(_frames, bz2.BZ2Decompressor),
    ".zst": functools.partial(_frames, _zstd_frame),
}


def check_compressions(paths: Iterable[Path], field: str) -> None:
    """Refuse a Zstandard file where neither Python nor a package reads it.

    Raises:
        ConfigError: naming the setting, the file and the package.
    """
    path = next((path for path in paths if path.suffix.lower() == ".zst"), None)
    if path is not None and _zstd() is None:
        raise ConfigError(f"{field}: '{path}' needs a package; pip install zstandard")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed by its suffix.

    Raises:
        ConfigError: naming the file, if it cannot be read or is no complete file of its compression.
    """
    suffix = path.suffix.lower()
    damaged: list[type[Exception]] = [lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error]
    if suffix == ".zst" and (module := _zstd()):
        damaged.append(module.ZstdError)
    try:
        with cast(BinaryIO, COMPRESSIONS.get(suffix, open)(path, "rb")) as file:
            if suffix in COMPRESSIONS and not path.stat().st_size:
                raise EOFError("the file is empty")
            yield file
    except tuple(damaged) as error:
        raise ConfigError(f"{path}: not a complete {suffix} file: {error}") from error
    except OSError as error:
        if error.errno is None:  # bz2
            raise ConfigError(f"{path}: not a complete {suffix} file: {error}") from error
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
