"""Sources that the settings name: which of their files are left out, and whether they have changed since."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flmjax.config import ConfigError, DataConfig
from flmjax.data.prepared import Prepared
from flmjax.data.sources import text_name, text_source
from flmjax.data.sources.documents import Source
from flmjax.data.sources.files import portable_name, say
from flmjax.data.sources.freelm import teacher_name, teacher_source, template_and_path
from flmjax.data.tokenizers import named_tokenizer


def named_sources(data: DataConfig) -> list[Source]:
    """The sources that data.sources and data.teachers name.

    Raises:
        ConfigError: for a name that is neither built in nor a path, for files that cannot be read, and for two names of
            the same files.
    """
    sources = [open_source() for _, open_source in _entries(data)]
    if data.mixture is None:
        _check_shared_files(data, dict(zip((*data.sources, *data.teachers), sources, strict=True)))
    return sources


def with_portable_names(data: DataConfig) -> DataConfig:
    """The settings with one spelling of every path: `./text/` is `text`."""
    vocabulary = data.vocabulary
    if vocabulary is not None and vocabulary.endswith(".model"):
        vocabulary = portable_name(vocabulary)
    return dataclasses.replace(
        data,
        sources=tuple(map(text_name, data.sources)),
        teachers=tuple(map(teacher_name, data.teachers)),
        vocabulary=vocabulary,
    )


def _check_shared_files(data: DataConfig, sources: Mapping[str, Source]) -> None:
    """Refuse two sources of the same files; say how many files two sources share, whose text therefore counts twice."""
    of_template: dict[str, list[tuple[str, set[tuple[int, int]]]]] = {}
    for name, source in sources.items():
        if source.files is None:
            continue
        setting = setting_of(data, source.is_teacher)
        template = template_and_path(source.name)[0] if source.is_teacher else ""
        others = of_template.setdefault(setting + template, [])
        files = source.files.identities()
        for other, other_files in others:
            both = f"'{other}' and '{name}'"
            if files == other_files:
                raise ConfigError(f"{setting}: {both} are the same files; name them once")
            if shared := len(files & other_files):
                say(f"{setting}: {shared:,} files are in both {both}; they are read for each")
        others.append((name, files))


def file_description(source: Source) -> dict[str, Any]:
    """What meta.json says of the files of a source: stamp, number of files read, and of those left out by suffix."""
    stamp = {} if source.stamp is None else {"stamp": source.stamp}
    if source.files is None:
        return stamp
    return {**stamp, "files": len(source.files.paths), "files_left_out": source.files.counts()}


def report_changes(data: DataConfig, prepared: Prepared) -> None:
    """Say on standard error which sources and which vocabulary file have changed since `prepared` was written.

    Nothing is said of a source or a vocabulary whose files are gone, because the prepared data are enough; nor of a
    seqio mixture and of a directory of an older version, which have no stamps.
    """
    is_new = f"has changed since {prepared.directory} was prepared"
    cure = "To prepare it anew, delete that folder, or set data.directory to another one"
    if _has_other_vocabulary(data, prepared):
        say(f"data.vocabulary: '{data.vocabulary}' {is_new}; its old pieces are used. {cure}")
    for field, open_source in _entries(data):
        try:
            source = open_source()
        except ConfigError:
            continue
        stored = prepared.meta["sources"].get(source.name, {})
        if stored.get("stamp", source.stamp) != source.stamp:
            now = 0 if source.files is None else len(source.files.paths)
            say(
                f"{field}: '{source.name}' {is_new} ({stored.get('files')} files then, {now} now); its old text is "
                f"used. {cure}"
            )


def _has_other_vocabulary(data: DataConfig, prepared: Prepared) -> bool:
    if data.vocabulary is None or not Path(data.vocabulary).is_file():
        return False
    try:
        tokenizer = named_tokenizer(data.vocabulary, data.end_id)
    except ConfigError:  # the file is no vocabulary now
        return True
    return tokenizer is not None and tokenizer.fingerprint != prepared.tokenizer.fingerprint


def _entries(data: DataConfig) -> Iterator[tuple[str, Callable[[], Source]]]:
    if data.mixture is not None:
        return
    for name in data.sources:
        yield setting_of(data, is_teacher=False), functools.partial(text_source, name, data.split_by)
    for name in data.teachers:
        yield setting_of(data, is_teacher=True), functools.partial(teacher_source, name, data)


def setting_of(data: DataConfig, is_teacher: bool) -> str:
    """Name of the setting that names the sources of text, or of teachers, for messages."""
    if data.mixture is not None:
        return "data.mixture"
    return "data.teachers" if is_teacher else "data.sources"
