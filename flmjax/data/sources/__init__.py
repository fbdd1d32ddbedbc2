"""Sources: where documents come from, and how a name in the settings becomes one.

A `Source` (documents.py) has a name and a function that reads its `Document`s: texts, or propositions of a teacher.

    setting                            read by                          documents
    data.sources = python_docs, hsk    python_docs.py, hsk.py           two built-in corpora, no download
    data.sources = PATH                files.py, text_files.py          a text file, a folder or a glob
    data.teachers = TEMPLATE:PATH ...  freelm.teacher_source            FreeLM's true and false propositions
    data.mixture = NAME                seqio_mixture.read_mixture       a registered seqio Task or Mixture

seqio_tasks.py registers Tasks: those of the paper on TFDS data sets, and helpers for new ones. tfds_folder.py turns a
folder of text files into a TFDS data set. These two and seqio_mixture.py import TensorFlow; the others do not.
"""

from collections.abc import Callable, Iterator

from flmjax.data.sources import hsk, python_docs, text_files
from flmjax.data.sources.documents import Document, Source
from flmjax.data.sources.files import find, portable_name

BUILT_IN: dict[str, Callable[[], Iterator[Document | str]]] = {
    "python_docs": python_docs.documents,
    "hsk": hsk.documents,
}


def text_name(name: str) -> str:
    """The one spelling of an entry of `data.sources`."""
    return portable_name(name, BUILT_IN)


def text_source(name: str, split_by: str = "text", field: str = "data.sources") -> Source:
    """The source that an entry of `data.sources` names.

    A name in BUILT_IN is that corpus, any other a file, a folder or a glob (files.find); `./python_docs` is a file
    or a folder of that name. With `split_by="path"` the documents of a file have its path within the source as their
    key, so that `en/a.txt` and `zh/a.txt`, pages of parallel folders, go to the same split.

    Args:
        field: the setting that error messages name.

    Raises:
        ConfigError: at once for a name that is neither built in nor a path, for a file or a folder that cannot be read,
            and for a missing optional package; while reading as text_files.documents.
    """
    if name in BUILT_IN:
        BUILT_IN[name]()  # a missing package is named at once; no document is read
        return Source(name, BUILT_IN[name], stamp=name)  # the corpora are part of the installation
    files = find(name, BUILT_IN, field)
    read = lambda: text_files.documents(files, split_by == "path")
    return Source(text_name(name), read, stamp=files.stamp(), files=files)
