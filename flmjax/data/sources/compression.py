"""Compressed files: gzip, xz and bzip2 of the standard library, Zstandard where Python or a package has it."""

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from flmjax.config import ConfigError

_ZSTD_PIECE = 512  # compressed bytes read at once: 128 blocks of 4 bytes, each of at most 128 KiB: 16 MiB of text


class _ZstdFile(io.RawIOBase):
    """The text of all frames of a .zst file, by the package zstandard.

    The package's own reader takes a file that was cut for a complete one, and ends after the first frame.
    """

    def __init__(self, path: Path, zstandard: ModuleType):
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._file = path.open("rb")
        self._frame: Any = None  # None between frames
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; returns the number of bytes, 0 at the end of the file."""
        while not self._text:
            compressed = self._compressed or self._file.read(_ZSTD_PIECE)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._text = memoryview(frame.decompress(compressed))
            self._frame, self._compressed = (None, frame.unused_data) if frame.eof else (frame, b"")
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


def _open_zstd(path: Path, mode: str) -> BinaryIO:
    module = _zstd()
    assert module is not None, "check_compressions refuses the file"
    if module.__name__ == "zstandard":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path, module)))
    return module.open(path, mode)


COMPRESSIONS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zstd,
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
            yield file
    except tuple(damaged) as error:
        raise ConfigError(f"{path}: not a complete {suffix} file: {error}") from error
    except OSError as error:
        if error.errno is None:  # bz2
            raise ConfigError(f"{path}: not a complete {suffix} file: {error}") from error
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
