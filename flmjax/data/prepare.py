"""Documents to token files, once: split by hash, train the tokenizer, tokenise, and seal the files with checksums.

The directory (its files: prepared.py) is written under a temporary name and renamed when it is complete. An empty
folder that exists, which may be a mount, is not replaced: its files are written to a folder in it and moved one by one,
meta.json last. So a directory with a meta.json is never incomplete. If the process is killed, the next one resumes its
work: it keeps the sources that were read and the parts that were tokenised.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flmjax.config import ConfigError, DataConfig
from flmjax.data.encode import Encoder, encode_parts, split_parts
from flmjax.data.held_out import Mixtures, check_held_out
from flmjax.data.named_sources import file_description, named_sources, report_changes, setting_of, with_portable_names
from flmjax.data.prepared import FORMAT, META_FILE, Prepared, load, read_meta
from flmjax.data.prepared_folder import is_empty, places_of, publish
from flmjax.data.sealing import describe_file, gzip_bits_per_byte, seal
from flmjax.data.sources.documents import Document, Source
from flmjax.data.sources.files import report_left_out
from flmjax.data.sources.freelm import marks
from flmjax.data.spool import SPLITS, Spool, slugs
from flmjax.data.tokenizers import (
    MODEL_FILE,
    SETTINGS_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    named_tokenizer,
)
from flmjax.disk import writing
from flmjax.lock import locked

PROGRESS_FILE = "progress.json"  # in an incomplete directory: settings, and stamps of the sources
VOCABULARY_FILE = "vocabulary.txt"  # in an incomplete directory: fingerprint of the vocabulary of its parts
TOKENIZER_TEXT_BYTES = 32 << 20  # a vocabulary is trained on at most this much training text


def prepare(
    data: DataConfig,
    directory: Path,
    *,
    sources: Mapping[str, Iterable[Document | str]] | None = None,
    mixtures: Mixtures | None = None,
    progress: bool = False,
    full_check: bool = False,
    is_trusted: bool = False,
) -> Prepared:
    """Write the token files of `data` to `directory`, or load them if an earlier call wrote them.

    Documents that are only white space are left out. The hash of a document's key, or of its text if it has no key,
    decides whether it is held out. Documents with equal keys therefore go to the same split, and so do equal texts
    without keys, also across sources; meta.json counts the texts that are in both splits.

    Memory holds some parts of 4 to 32 MB of text for each process, and a few bytes for each document; while this runs,
    the disk holds the text and a second copy of the tokens. For 16 MB of text or more, processes are started: a script
    that calls this needs Python's `if __name__ == "__main__":`. If another process is preparing `directory`, this one
    says so and waits for it. Standard error says which files are left out, and for an existing directory which sources
    have changed since; it keeps its text.

    Args:
        sources: documents of each entry of data.sources and data.teachers, in place of built-in corpora and files.
        mixtures: of the run (held_out.mixtures_of): a source without any share needs no held-out document. None: that
            of `data` alone.
        progress: show progress bars on standard error.
        full_check: read every file of an existing directory, as `full` of `load`.
        is_trusted: another process of this run has checked the files; checksums are not computed again.

    Raises:
        ConfigError: for a source without documents, for no training or no validation documents, for text that is not
            Unicode, for an unreadable file, for marks that the vocabulary cannot tell apart, and for a `directory` that
            holds something else or was prepared with other settings (with the names of the fields). No incomplete
            directory is left.
    """
    directory = Path(directory).absolute()
    settings = _settings(data)
    names = (*data.sources, *data.teachers)
    if sources is not None and set(sources) != set(names):
        raise ConfigError(f"sources are {sorted(sources)}, but data.sources and data.teachers are {sorted(names)}")
    if (directory / META_FILE).exists():
        check_sources = sources is None and not is_trusted
        return _load_same(directory, data, mixtures, settings, full_check, check_sources, is_trusted)
    target, partial, lock = places_of(directory)  # only the process with the lock writes to them
    # A wrong name is refused here, before anything is written.
    preparation = _Preparation(data, mixtures, settings, partial, sources, progress)
    with locked(lock, str(directory), wait=True), writing(directory):
        if partial.parent == target and (partial / META_FILE).exists():  # a process ended while it moved the files
            publish(partial, target)
        if (directory / META_FILE).exists():  # another process prepared it while this one waited
            return _load_same(directory, data, mixtures, settings, full_check, False)
        if target.exists() and not (target.is_dir() and is_empty(target, partial, lock)):
            raise ConfigError(f"{directory} exists and is no prepared data ({META_FILE} is missing); choose another")
        try:
            preparation.run()
            publish(partial, target)
        except ConfigError:  # after a kill, an interrupt or a full disk the next call resumes
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return load(directory)


def _settings(data: DataConfig) -> dict[str, Any]:
    """The settings that decide the content of the directory."""
    fields = ["vocabulary", "end_id", "validation_fraction", "split_by", "end_of_document"]
    fields += ["sources", "teachers"] if data.mixture is None else ["mixture"]
    if data.vocabulary in (None, "sentencepiece"):
        fields.append("vocab_size")
    if data.mixture is not None or data.teachers:
        fields += ["true_mark", "false_mark"]
    data = with_portable_names(data)
    settings = {field: getattr(data, field) for field in fields}
    if data.vocabulary is None and data.mixture is None:
        settings["vocabulary"] = "sentencepiece"
    return json.loads(json.dumps(settings))


def _load_same(
    directory: Path,
    data: DataConfig,
    mixtures: Mixtures | None,
    settings: dict[str, Any],
    full: bool,
    check_sources: bool,
    is_trusted: bool = False,
) -> Prepared:
    stored = {**_settings(DataConfig()), **read_meta(directory)["settings"]}
    names = with_portable_names(DataConfig(**{name: stored[name] for name in ("sources", "teachers", "vocabulary")}))
    stored |= {"sources": [*names.sources], "teachers": [*names.teachers], "vocabulary": names.vocabulary}
    differing = [
        f"data.{name}={there!r} there, {here!r} in this config"
        for name, (there, here) in _differences(stored, settings).items()
    ]
    if differing:
        raise ConfigError(
            f"{directory} was prepared with other settings: {'; '.join(differing)}; take another folder, or "
            "delete this one to prepare it anew"
        )
    prepared = load(directory, full, is_trusted)
    counts = {
        name: {split: of_source[split]["documents"] for split in SPLITS}
        for name, of_source in prepared.meta["sources"].items()
    }
    texts = {name: None if prepared.is_teacher(name) else of_source for name, of_source in counts.items()}
    check_held_out(data, texts, mixtures)
    if check_sources:
        report_changes(data, prepared)
    return prepared


def has_same_preparation(a: DataConfig, b: DataConfig) -> bool:
    """Whether two settings of data have the same token files and vocabulary, if the texts are the same."""
    # Prepared data do not store the module, which may register another mixture of the same name.
    return a.task_module == b.task_module and not _differences(_settings(a), _settings(b))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values of both settings, as _settings gives them, where they differ."""
    default = _settings(DataConfig())
    a, b = {**default, **a}, {**default, **b}
    names = a.keys() | b.keys() if _trains(a) and _trains(b) else (a.keys() | b.keys()) - {"vocab_size"}
    return {name: (a.get(name), b.get(name)) for name in sorted(names) if a.get(name) != b.get(name)}


def ready_vocabulary(data: DataConfig, mixture_vocabulary: Tokenizer | None) -> Tokenizer | None:
    """The vocabulary that data.vocabulary names, else that of the mixture; None: it must be trained on the text.

    Raises:
        ConfigError: for an end id that is not read, and as named_tokenizer.
    """
    if data.vocabulary is None and mixture_vocabulary is not None:
        if data.end_id is not None:
            raise ConfigError(f"data.end_id={data.end_id} is not read: the mixture's vocabulary has an end id")
        return mixture_vocabulary
    return named_tokenizer(data.vocabulary or "sentencepiece", data.end_id)


def _trains(settings: dict[str, Any]) -> bool:
    """Whether the settings ask for a vocabulary that is trained on the text."""
    return settings["vocabulary"] in (None, "sentencepiece")


# ---- writing --------------------------------------------------------------------------------------------------------


class _Preparation:
    """Preparation of a directory in `folder`; it resumes that of an earlier process if the settings are the same."""

    def __init__(
        self,
        data: DataConfig,
        mixtures: Mixtures | None,
        settings: dict[str, Any],
        folder: Path,
        documents: Mapping[str, Iterable[Document | str]] | None,
        progress: bool,
    ):
        self.data, self.mixtures, self.settings, self.folder, self.progress = data, mixtures, settings, folder, progress
        self.rates: tuple[float, ...] | None = None
        mixture_vocabulary: Tokenizer | None = None
        self.provenance: dict[str, Any] = {}
        if documents is not None:
            names = (*data.sources, *data.teachers)
            self.sources = [Source(n, functools.partial(iter, documents[n]), n in data.teachers) for n in names]
        elif data.mixture is not None:
            from flmjax.data.sources.seqio_mixture import read_mixture  # TensorFlow: 5 s, an optional package

            mixture = read_mixture(data)
            self.sources, self.rates = list(mixture.sources), mixture.rates
            mixture_vocabulary, self.provenance = mixture.vocabulary, mixture.provenance
            if data.mixture_weights is not None and len(data.mixture_weights) != len(self.sources):
                tasks = [source.name for source in self.sources]
                raise ConfigError(
                    f"data.mixture_weights has {len(data.mixture_weights)} entries for the {len(tasks)} tasks of "
                    f"data.mixture='{data.mixture}': {', '.join(tasks)}; None takes the mixture's rates"
                )
        else:
            self.sources = named_sources(data)
        self.slugs = slugs(tuple(source.name for source in self.sources))
        self.has_teacher = any(source.is_teacher for source in self.sources)
        self.vocabulary = ready_vocabulary(data, mixture_vocabulary)  # errors are raised before a source is read
        if self.vocabulary is not None and self.has_teacher:
            marks(self.vocabulary, data)

    def run(self) -> None:
        """Read the sources, train or load the vocabulary, tokenise and seal; finished steps are not repeated."""
        for source in self.sources:
            report_left_out(setting_of(self.data, source.is_teacher), source.name, source.files)
        self.open()
        spools = self.read()
        tokenizer = self.vocabulary or self.train_vocabulary(spools)
        names = self.save_vocabulary(tokenizer)
        mark_ids = marks(tokenizer, self.data) if self.has_teacher else None
        encoder = Encoder(tokenizer, self.data.end_of_document, mark_ids)
        parts = {
            (name, split): split_parts(spool.splits[split], self.folder, f"{spool.slug}-{split}")
            for name, spool in spools.items()
            for split in SPLITS
        }
        all_parts = list(itertools.chain.from_iterable(parts.values()))
        encode_parts(all_parts, encoder, self.folder, self.data.workers, self.progress)
        files = {name: describe_file(self.folder / name) for name in names}
        counts: dict[str, dict[str, Any]] = {}
        for source in self.sources:
            spool = spools[source.name]
            counts[source.name] = {**_description(source, spool), "changed": 0}
            for split in SPLITS:
                stem = self.folder / f"{spool.slug}-{split}"
                tokens, changed = seal(parts[source.name, split], encoder, stem, source.is_teacher, files)
                counts[source.name]["changed"] += changed  # documents whose tokens do not decode to their text
                sizes = spool.splits[split].sizes
                counts[source.name][split] = {"documents": len(sizes), "tokens": tokens, "bytes": int(sizes.sum())}
        hashes = {s: np.concatenate([spool.splits[s].hashes for spool in spools.values()]) for s in SPLITS}
        all_hashes = np.concatenate(list(hashes.values()))
        meta = {
            "format": FORMAT,
            "settings": self.settings,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "end_id": tokenizer.end_id,
            },
            **({} if encoder.marks is None else {"marks": encoder.marks._asdict()}),
            **({} if self.rates is None else {"rates": self.rates}),
            **self.provenance,
            "sources": counts,
            "duplicates": len(all_hashes) - len(np.unique(all_hashes)),
            "held_out_in_training": len(np.intersect1d(hashes["train"], hashes["validation"])),
            "validation_gzip_bits_per_byte": gzip_bits_per_byte(
                spools[source.name] for source in self.sources if not source.is_teacher
            ),
            "files": files,
        }
        for part in all_parts:
            part.path.unlink()
        for spool in spools.values():
            spool.delete()
        (self.folder / PROGRESS_FILE).unlink()
        (self.folder / VOCABULARY_FILE).unlink()
        # ASCII: it also holds the bytes of file names that are no UTF-8.
        (self.folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def open(self) -> None:
        """Create the folder, or keep the work of an earlier process: its settings and stamps must be the same."""
        progress = self.folder / PROGRESS_FILE
        current = {"settings": self.settings, "stamps": {source.name: source.stamp for source in self.sources}}
        try:
            stored = json.loads(progress.read_text(encoding="utf-8"))
            same = stored["settings"] == self.settings and list(stored["stamps"]) == list(current["stamps"])
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        elif None in current["stamps"].values() or stored != current:
            for source, slug in zip(self.sources, self.slugs, strict=True):
                if source.stamp is None or source.stamp != stored["stamps"][source.name]:
                    Spool(self.folder, slug).forget()
            for part in self.folder.glob("*.part*"):  # their vocabulary may have been trained on the old text
                part.unlink()
        progress.write_text(json.dumps(current), encoding="utf-8")

    def read(self) -> dict[str, Spool]:
        """The documents of every source on disk."""
        spools = {}
        for source, slug in zip(self.sources, self.slugs, strict=True):
            spools[source.name] = spool = Spool(self.folder, slug)
            if not spool.reload():
                documents = _watched(source.read(), source.name, self.progress)
                try:
                    spool.fill(documents, source.name, self.data.validation_fraction, source.is_teacher)
                except ConfigError as error:
                    raise ConfigError(f"{setting_of(self.data, source.is_teacher)}: {error}") from error
        self.check(spools)
        return spools

    def check(self, spools: Mapping[str, Spool]) -> None:
        """Refuse a source without training documents, and a source of text that needs held-out documents."""
        for source in self.sources:
            setting = setting_of(self.data, source.is_teacher)
            sizes = {split: len(spools[source.name].splits[split].sizes) for split in SPLITS}
            if not any(sizes.values()):
                raise ConfigError(f"{setting}: '{source.name}' has no documents (no text at all)")
            if not sizes["train"]:
                raise ConfigError(f"{setting}: every document of '{source.name}' is held out; add documents")
        counts = {name: {split: len(spool.splits[split].sizes) for split in SPLITS} for name, spool in spools.items()}
        texts = {source.name: None if source.is_teacher else counts[source.name] for source in self.sources}
        check_held_out(self.data, texts, self.mixtures)

    def train_vocabulary(self, spools: Mapping[str, Spool]) -> Tokenizer:
        """A SentencePiece model that is trained on the training text."""
        total = sum(int(spool.splits["train"].sizes.sum()) for spool in spools.values())
        texts = (text for spool in spools.values() for text in spool.splits["train"].read())
        keep = min(1.0, TOKENIZER_TEXT_BYTES / total)
        return SentencePieceTokenizer.train(texts, self.data.vocab_size, keep=keep)

    def save_vocabulary(self, tokenizer: Tokenizer) -> list[str]:
        """Write the vocabulary and return the names of its files; parts with the ids of another one are removed."""
        path = self.folder / VOCABULARY_FILE
        if not path.exists() or path.read_text(encoding="utf-8") != tokenizer.fingerprint:
            for old in (*self.folder.glob("*.part*"), self.folder / MODEL_FILE, self.folder / SETTINGS_FILE):
                old.unlink(missing_ok=True)
            path.write_text(tokenizer.fingerprint, encoding="utf-8")
        return [saved.name for saved in tokenizer.save(self.folder)]


def _watched(items: Iterable[Any], label: str, progress: bool) -> Iterator[Any]:
    # disable=None: silent where standard error is no terminal
    return iter(tqdm(items, label, unit=" documents", leave=False, disable=None if progress else True))


def _description(source: Source, spool: Spool) -> dict[str, Any]:
    """Entries of a source in meta.json, but for the counts of its tokens."""
    return {
        "slug": spool.slug,
        "is_teacher": source.is_teacher,
        "duplicates": spool.duplicates(),
        "documents_left_out": spool.left_out,
        **file_description(source),
    }
