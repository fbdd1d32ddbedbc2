"""Errors of a file system that name what was being written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in an error of the block that names no file: a full disk is noticed when an open file is written.

    Raises:
        OSError: of the block, with the name.
    """
    try:
        yield
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        if error.errno is None:  # of NumPy, which counts the elements that it has written
            raise OSError(f"{error}: '{path}'") from error
        if error.filename is None:
            error.filename = str(path)
        raise
