"""Files of a source: one walker for the name of a file, a folder and a glob, which counts the files that it leaves out.

The name of a file, without the suffix of a compression, says its format. A folder is read recursively: files of known
formats are read, all others and hidden entries are left out and counted. Links are followed; a folder or a file that
several links lead to counts once, by device and inode.
"""

import contextlib
import dataclasses
import fnmatch
import glob
import hashlib
import os
import stat
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from flmjax.config import ConfigError, nearest
from flmjax.data.sources.compression import COMPRESSIONS, check_compressions

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
# Formats that hold no plain text. A file of another unknown format that is named itself is read.
OTHER_FORMATS = frozenset(
    f".{suffix}"
    for suffixes in (
        ("parquet", "arrow", "feather", "orc", "avro", "tfrecord", "tfrecords", "array_record", "riegeli", "msgpack"),
        ("npy", "npz", "h5", "hdf5", "pkl", "pickle", "pt", "pth", "bin", "safetensors", "gguf", "sqlite", "db"),
        ("zip", "tar", "tgz", "tbz2", "txz", "7z", "rar", "lz4", "lzma", "lzo", "br", "z", "iso", "img", "jar"),
        ("pdf", "ps", "djvu", "epub", "mobi", "doc", "docx", "odt", "rtf", "xls", "xlsx", "ods", "ppt", "pptx"),
        ("png", "jpg", "jpeg", "gif", "bmp", "tif", "tiff", "webp", "mp3", "mp4", "wav", "flac", "ogg", "avi", "mkv"),
        ("so", "exe", "dll", "o", "a", "class", "pyc", "ipynb"),
    )
    for suffix in suffixes
)
HIDDEN, NO_SUFFIX, SPECIAL, LOOP = "hidden", "without suffix", "no regular file", "link to a folder above"


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a source.

    Attributes:
        paths: sorted.
        root: the folder that keys and ids give the paths relative to.
        left_out: paths that are not read, by suffix or another reason.
    """

    paths: list[Path]
    root: Path
    left_out: Mapping[str, list[Path]] = dataclasses.field(default_factory=dict)

    def key(self, path: Path) -> str:
        """The path below the root without the suffix of a compression, in Unicode's normal form C.

        Names of one page that were composed on one machine and decomposed on another are equal. A byte that is no UTF-8
        is a surrogate (PEP 383), whatever the locale.
        """
        name = os.fsencode(path.relative_to(self.root).with_name(uncompressed_name(path)))
        return unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape"))

    def stamp(self) -> str:
        """sha256 (hexadecimal) of the paths below the root, sizes and modification times of the files."""
        digest = hashlib.sha256()
        for path in self.paths:
            with contextlib.suppress(OSError):  # a file that is gone by now
                status = path.stat()
                digest.update(os.fsencode(path.relative_to(self.root)))
                digest.update(b"\0%d %d\n" % (status.st_size, status.st_mtime_ns))
        return digest.hexdigest()

    def identities(self) -> set[tuple[int, int]]:
        """Device and inode of every file."""
        return {_identity(path.stat()) for path in self.paths}

    def counts(self) -> dict[str, int]:
        """Number of paths that are left out, by suffix or another reason, in alphabetical order."""
        return {label: len(paths) for label, paths in sorted(self.left_out.items())}


def describe_left_out(files: Files) -> str:
    """The files that are left out in words: `1 .rst (notes.rst), 2 without suffix (README, ...)`."""
    words = []
    for label, paths in sorted(files.left_out.items()):
        words.append(f"{len(paths)} {label} ({paths[0].name}{', ...' * (len(paths) > 1)})")
    return ", ".join(words)


def report_left_out(field: str, source: str, files: Files | None) -> None:
    """Say on standard error which files of a source are not read, if there are any."""
    if files is not None and files.left_out:
        say(f"{field}: '{source}': {len(files.paths)} files; left out: {describe_left_out(files)}")


def say(line: str) -> None:
    """Print a line on standard error, whatever bytes are in the names of files."""
    printable = line.encode("utf-8", "backslashreplace").decode()
    print(f"flmjax: {printable}", file=sys.stderr, flush=True)


def uncompressed_name(path: Path) -> str:
    """The name of a file without the suffix of a compression."""
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def format_of(path: Path) -> str:
    """The suffix of the uncompressed file in lower case, such as ".txt" for A.TXT.gz; empty if there is none."""
    return Path(uncompressed_name(path)).suffix.lower()


def portable_name(name: str, names: Iterable[str] = ()) -> str:
    """The one spelling of a path: in the characters of a UTF-8 locale, without `./`, `//` and `/` at the end.

    In other locales Python decodes the same bytes otherwise.

    Args:
        names: built-in sources; a path of such a name begins with `./`.
    """
    with contextlib.suppress(UnicodeError):  # bytes that are no UTF-8; a name that the locale cannot write
        name = os.fsencode(name).decode("utf-8")
    path = str(PurePosixPath(name)) if name.strip() else name
    return f"./{path}" if path != name and path in names else path


def find(
    source: str,
    names: Collection[str],
    field: str = "data.sources",
    suffixes: tuple[str, ...] = (*TEXT_SUFFIXES, *RECORD_SUFFIXES),
) -> Files:
    """The files of a file's name, a folder or a glob.

    A folder is searched recursively for files with `suffixes`. A file that is named itself or that matches the glob is
    read whatever its suffix, unless that is one of OTHER_FORMATS: such a file is refused, or left out of the glob.

    Args:
        names: built-in sources; an error message suggests the nearest ones.
        field: the setting that error messages name.

    Raises:
        ConfigError: if the path does not exist or is a file of another format; if no file of the folder or the glob is
            read; for a folder, a file or a link that cannot be read, and for a compression that needs a package.
    """
    if not source.strip():
        raise ConfigError(f"{field}: a source is empty; name a file, a folder or a glob ('.' is the current folder)")
    path = _local_path(source, field)
    walker = _Walker(field)
    status = walker.status(path, missing_ok=True)
    if status is not None and stat.S_ISREG(status.st_mode):
        if format_of(path) in OTHER_FORMATS:
            raise ConfigError(
                f"{field}: '{source}' is a {_label(path)} file, not text: convert or unpack it to text (.txt, .md) or "
                "JSON lines (.jsonl)"
            )
        files = Files([path], path.parent)
    elif status is not None and stat.S_ISDIR(status.st_mode):
        paths = walker.regular(walker.tree(path), lambda p: format_of(p) in suffixes)
        files = Files(paths, path, walker.left_out)
        if not paths:
            known = " or ".join(suffixes)
            packed = ", ".join(COMPRESSIONS)
            raise ConfigError(f"{field}: folder '{source}' holds no {known} file (nor {packed}){_but(files)}")
    elif status is not None:
        raise ConfigError(f"{field}: '{source}' is neither a regular file nor a folder; write the text to a file")
    elif glob.has_magic(source):
        root = next(p for p in path.parents if not glob.has_magic(str(p)))
        matches = walker.matches(root, path.relative_to(root).parts)
        paths = walker.regular(matches, lambda p: format_of(p) not in OTHER_FORMATS)
        files = Files(paths, root, walker.left_out)
        if not paths:
            raise ConfigError(f"{field}: no file matches '{source}'{_tried(path)}{_but(files)}")
    elif "/" in source or "." in source or not names:
        raise ConfigError(f"{field}: no file or folder '{source}'{_tried(path)}")
    else:
        words = "is neither a built-in source nor a path"
        raise ConfigError(f"{field}: '{source}' {words}{nearest(source, names)}{_tried(path)}")
    check_compressions(files.paths, field)
    for path in files.paths:
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{field}: '{path}' cannot be read: permission denied")
    return files


def _local_path(source: str, field: str) -> Path:
    """The path that a name stands for; a name that the locale cannot write is the one with these bytes in UTF-8."""
    try:
        os.fsencode(source)
    except UnicodeEncodeError:
        source = os.fsdecode(source.encode("utf-8", "surrogateescape"))
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # ~name, where no user has that name
        raise ConfigError(f"{field}: '{source}': {error}") from None


def _tried(path: Path) -> str:
    """The absolute path for a message that names a relative one, which another current folder may explain."""
    return "" if path.is_absolute() else f" (tried {path.absolute()})"


def _label(path: Path) -> str:
    """The suffix of a file with that of its compression, as messages count it."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    return format_of(path) + compression or NO_SUFFIX


def _but(files: Files) -> str:
    return f" that can be read; left out: {describe_left_out(files)}" if files.left_out else ""


class _Walker:
    """A walk over folders.

    Attributes:
        field: the setting that error messages name.
        left_out: paths that are not read, by suffix or another reason.
    """

    def __init__(self, field: str):
        self.field = field
        self.left_out: dict[str, list[Path]] = {}

    def leave_out(self, label: str, path: Path) -> None:
        """Count a path as left out."""
        self.left_out.setdefault(label, []).append(path)

    def status(self, path: Path, missing_ok: bool = False) -> os.stat_result | None:
        """The status of a path, links followed; None for a path that does not exist, if `missing_ok`."""
        try:
            return path.stat()
        except (OSError, ValueError) as error:
            if missing_ok and isinstance(error, FileNotFoundError | NotADirectoryError) and not path.is_symlink():
                return None
            reason = getattr(error, "strerror", None) or error
            target = f", a link to '{os.readlink(path)}'," if os.path.islink(path) else ""
            raise ConfigError(f"{self.field}: '{path}'{target} cannot be read: {reason}") from None

    def entries(self, folder: Path) -> list[Path]:
        """The entries of a folder in the order of their names."""
        try:
            with os.scandir(folder) as entries:
                return sorted((folder / entry.name for entry in entries), key=_order)
        except OSError as error:
            raise ConfigError(f"{self.field}: folder '{folder}' cannot be read: {error.strerror}") from None

    def is_folder(self, path: Path) -> bool:
        """Whether a path is a folder or a link to one."""
        status = self.status(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def folders(self, root: Path) -> Iterator[tuple[Path, list[Path]]]:
        """The root and the folders below it, each with its other entries; hidden folders are such an entry.

        A folder that several links lead to comes once. Folders come before links to folders, so that a file has its own
        path. A link to a folder above the root is left out.
        """
        above = {_identity(self.status(folder)) for folder in root.resolve().parents}
        seen: set[tuple[int, int]] = set()
        waiting, links = [root], deque[Path]()
        while waiting or links:
            folder = waiting.pop() if waiting else links.popleft()
            identity = _identity(self.status(folder))
            if identity in above:
                self.leave_out(LOOP, folder)
                continue
            if identity in seen:
                continue
            seen.add(identity)
            entries = self.entries(folder)
            below = [path for path in entries if not path.name.startswith(".") and self.is_folder(path)]
            yield folder, sorted({*entries} - {*below})
            for path in reversed(below):
                (links if path.is_symlink() else waiting).append(path)

    def tree(self, root: Path) -> Iterator[Path]:
        """The files below a folder; hidden entries are counted as left out."""
        for _, entries in self.folders(root):
            for path in entries:
                if path.name.startswith("."):
                    self.leave_out(HIDDEN, path)
                else:
                    yield path

    def matches(self, folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """The files below a folder that match the parts of a glob; `**` stands for any number of folders."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            for below, _ in self.folders(folder) if folder.is_dir() else ():
                yield from self.matches(below, rest or ("*",))
        elif not glob.has_magic(part):
            yield from self.continued(folder / part, rest)
        elif folder.is_dir():
            for path in self.entries(folder):
                is_hidden = path.name.startswith(".") and not part.startswith(".")
                if not is_hidden and fnmatch.fnmatchcase(path.name, part):
                    yield from self.continued(path, rest)

    def continued(self, path: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """A file if no part of the glob is left, else its matches below `path` if that is a folder."""
        status = self.status(path, missing_ok=True)
        if status is not None and stat.S_ISDIR(status.st_mode) == bool(parts):
            yield from self.matches(path, parts) if parts else (path,)

    def regular(self, paths: Iterable[Path], is_read: Callable[[Path], bool]) -> list[Path]:
        """The paths that are read, sorted: a file that several paths lead to once, by its own path if that is here."""
        chosen: dict[tuple[int, int], Path] = {}
        for path in sorted(paths, key=lambda p: (p.is_symlink(), *_order(p))):
            status = self.status(path)
            if status is None or not stat.S_ISREG(status.st_mode):
                self.leave_out(SPECIAL, path)
            elif is_read(path):
                chosen.setdefault(_identity(status), path)
            else:
                self.leave_out(_label(path), path)
        return sorted(chosen.values(), key=_order)


def _order(path: Path) -> tuple[bytes, ...]:
    """Order of paths, part by part: that of the code points of UTF-8, in every locale."""
    return tuple(map(os.fsencode, path.parts))


def _identity(status: os.stat_result | None) -> tuple[int, int]:
    assert status is not None
    return status.st_dev, status.st_ino
