"""The folder of token files while they are prepared: an incomplete directory becomes it, or its files move into it."""

import os
import shutil
from pathlib import Path

from flmjax.config import ConfigError
from flmjax.data.prepared import META_FILE


def discard(directory: Path) -> None:
    """Remove a prepared directory; a link and a mount stay, without the files."""
    if not directory.is_symlink() and not directory.is_mount():
        shutil.rmtree(directory)
        return
    for path in directory.iterdir():
        if path.is_file():
            path.unlink()


def places_of(directory: Path) -> tuple[Path, Path, Path]:
    """The folder that a link leads to or `directory` itself, the incomplete directory, and the lock file.

    The incomplete directory is in the folder if that exists, else beside it; the lock is beside it where it can be.

    Raises:
        ConfigError: for a link that leads to itself.
    """
    target = Path(os.path.realpath(directory)) if directory.is_symlink() else directory
    if target.is_symlink():
        raise ConfigError(f"{directory} is a link that leads to itself; remove it, or take another folder")
    partial = target / ".partial" if target.exists() else target.parent / f".{target.name}.partial"
    is_inside = target.is_dir() and not os.access(target.parent, os.W_OK)
    return target, partial, target / ".lock" if is_inside else target.parent / f".{target.name}.lock"


def is_empty(folder: Path, *ours: Path) -> bool:
    """Whether a folder holds nothing but our paths and the folder that a file system's root has from the start."""
    return {path.name for path in folder.iterdir()} <= {"lost+found", *(path.name for path in ours)}


def publish(partial: Path, target: Path) -> None:
    """Rename a complete directory, or move its files to the folder that it is in, meta.json last."""
    if partial.parent != target:
        os.replace(partial, target)
        return
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == META_FILE, path.name)):
        os.replace(path, target / path.name)
    partial.rmdir()
