"""Compiled programs of a run on disk, so that a process that goes on with the run compiles nothing."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import logging
from jax._src import compilation_cache as jax_cache
from jax.experimental.compilation_cache import compilation_cache

from flmjax.config import RunConfig
from flmjax.sharding.processes import is_writer

CACHE_FOLDER = "compile_cache"
FOLDER_OPTION = "jax_compilation_cache_dir"
UNREADABLE = r"Error reading persistent compilation cache entry for '(.*?)':"  # JAX's warning, with the program's name


@contextlib.contextmanager
def compile_cache(config: RunConfig, workdir: Path) -> Iterator[None]:
    """Store the programs that the block compiles, and load those that are stored instead of compiling them.

    The folder is config.compile_cache, else that of JAX's own setting (JAX_COMPILATION_CACHE_DIR), else
    WORKDIR/compile_cache. Every process of the run reads; process 0 writes. A program is stored under a hash of its
    code, of its compiler's options, and of the versions and devices: a folder that several runs share is never wrong.
    The folder may be deleted at any time. JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    jax_folder = jax.config.values[FOLDER_OPTION]
    if jax_folder is not None and config.compile_cache is None:
        with _damaged_entries_removed(jax_folder):
            yield
        return
    folder = config.compile_cache or str(workdir / CACHE_FOLDER)
    if config.compile_cache and "://" not in folder:
        Path(folder).mkdir(parents=True, exist_ok=True)  # JAX would only warn, of every program
    options: dict[str, Any] = {
        FOLDER_OPTION: folder,
        # JAX leaves out programs that compile in less than 1 s: a run would compile its small programs at every start.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in options}
    _configure(options)
    try:
        with _damaged_entries_removed(folder):
            yield
    finally:
        _configure(before)


def _configure(options: dict[str, Any]) -> None:
    """Set options of JAX; its cache looks at them when it is used first, and after a reset."""
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _damaged_entries_removed(folder: str) -> Iterator[None]:
    """Remove entries that JAX cannot read in the block, as those of a process that was killed while it wrote one.

    JAX compiles such a program, but does not replace the file: every later process would compile it once more.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        unreadable = re.match(UNREADABLE, str(message))
        removed = _remove_damaged(Path(folder), unreadable[1]) if unreadable else 0
        if not removed:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=UNREADABLE)  # else Python shows one of several for a program
        shown, warnings.showwarning = warnings.showwarning, show
        yield


def _remove_damaged(folder: Path, program: str) -> int:
    """Remove the entries of a program that are not complete; returns their number. Process 0 alone removes."""
    damaged = [path for path in folder.glob(f"{program}-*-cache") if not _is_complete(path)] if is_writer() else []
    for path in damaged:
        path.unlink(missing_ok=True)
        logging.warning("removed %s, which was damaged; %s is compiled again", path, program)
    return len(damaged)


def _is_complete(path: Path) -> bool:
    """Whether JAX can decompress an entry, by Zstandard if that library is installed, else by zlib."""
    try:
        jax_cache.decompress_executable(path.read_bytes())
    except Exception:  # the libraries raise classes of their own; an entry that is removed is only compiled again
        return False
    return True
