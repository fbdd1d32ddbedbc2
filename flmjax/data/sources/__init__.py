"""Where documents come from: two corpora that need no download, and text files."""

from collections.abc import Callable, Iterable, Iterator

from flmjax.data.sources import hsk, python_docs, text_files
from flmjax.data.sources.documents import Document, Source

BUILT_IN: dict[str, Callable[[], Iterator[Document | str]]] = {
    "python_docs": python_docs.documents,
    "hsk": hsk.documents,
}


def text_source(name: str, split_by: str = "text", field: str = "data.sources") -> Source:
    """The source that an entry of `data.sources` means.

    It is a built-in name, else a file, a folder or a glob (see text_files.find); a file or folder that happens to bear
    a built-in name is reached as `./python_docs`. `split_by="path"` gives all documents of a file its path within the
    source as their key: pages of parallel folders, `en/a.txt` and `zh/a.txt`, are then on the same side of the split.

    Raises:
        ConfigError: at once for a name that is nothing, at the first document for a missing optional package, while
            reading for a file that is not UTF-8 (named, with the byte).
    """
    if name in BUILT_IN:
        return Source(name, BUILT_IN[name], stamp=name)  # part of this installation
    files = source_files(name, field)
    return Source(name, lambda: text_files.documents(files, split_by == "path"), stamp=text_files.stamp(files))


def source_files(name: str, field: str, built_in: Iterable[str] = BUILT_IN) -> text_files.Files:
    """The files that `name` means, which is none of the `built_in` names.

    Raises:
        ConfigError: naming `field` when there are none.
    """
    return text_files.find(name, built_in, field)
