"""Where documents come from: two corpora that need no download, and text files."""

from collections.abc import Iterator

from flmjax.data.corpus import hsk, python_docs, text_files

BUILT_IN = {"python_docs": python_docs.documents, "hsk": hsk.documents}


def read_source(source: str) -> Iterator[str]:
    """The documents of one entry of `data.sources`, always in the same order.

    `source` is a built-in name, else a file, a folder or a glob (see text_files.find); a file or folder that happens
    to bear a built-in name is reached as `./python_docs`.

    Raises:
        ConfigError: at once for a name that is nothing, at the first document for a missing optional package, while
            reading for a file that is not UTF-8 (named, with the byte).
    """
    if source in BUILT_IN:
        return BUILT_IN[source]()
    return text_files.documents(text_files.find(source, BUILT_IN))
