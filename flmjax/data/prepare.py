"""Documents to token files, once: split by hash, train the tokenizer, tokenise, and seal the files with checksums.

The directory (its files: prepared.py) is written under a temporary name and renamed when it is complete, so that a
directory with a meta.json is never incomplete. If the process is killed, the next one resumes its work: it keeps the
sources that were read and the parts that were tokenised.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flmjax.config import ConfigError, DataConfig
from flmjax.data.encode import Encoder, Part, encode_parts, split_parts
from flmjax.data.named_sources import file_description, named_sources, report_changes
from flmjax.data.prepared import CORRECTIONS, FORMAT, META_FILE, Prepared, load, read_meta, sha256
from flmjax.data.sources.documents import Document, Source
from flmjax.data.sources.files import portable_name, report_left_out
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
GZIP_BYTES = 16 << 20  # gzip is measured on at most this much held-out text of each source


def prepare(
    data: DataConfig,
    directory: Path,
    *,
    sources: Mapping[str, Iterable[Document | str]] | None = None,
    progress: bool = False,
    full_check: bool = False,
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
        progress: show progress bars on standard error.
        full_check: read every file of an existing directory, as `full` of `load`.

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
        return _load_same(directory, data, settings, full_check, sources is None)
    partial = directory.with_name(f".{directory.name}.partial")  # only the process with the lock writes it
    preparation = _Preparation(data, settings, partial, sources, progress)  # a wrong name leaves nothing behind
    with locked(directory.with_name(f".{directory.name}.lock"), str(directory), wait=True), writing(directory):
        if (directory / META_FILE).exists():  # another process prepared it while this one waited
            return _load_same(directory, data, settings, full_check, False)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(f"{directory} exists and is no prepared data ({META_FILE} is missing); choose another")
        try:
            preparation.run()
            os.replace(partial, directory)
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
    settings = {field: getattr(data, field) for field in fields}
    for field in settings.keys() & {"sources", "teachers"}:
        settings[field] = [portable_name(name) for name in settings[field]]
    if data.vocabulary is not None:
        settings["vocabulary"] = portable_name(data.vocabulary)
    elif data.mixture is None:
        settings["vocabulary"] = "sentencepiece"
    return json.loads(json.dumps(settings))


def _load_same(
    directory: Path, data: DataConfig, settings: dict[str, Any], full: bool, check_sources: bool
) -> Prepared:
    default = _settings(DataConfig())
    stored = {**default, **read_meta(directory)["settings"]}
    current = {**default, **settings}
    names = sorted(stored.keys() | current.keys())
    if not (_trains(stored) and _trains(current)):
        names.remove("vocab_size")
    differing = [
        f"data.{name}={stored.get(name)!r} there, {current.get(name)!r} in this config"
        for name in names
        if stored.get(name) != current.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{directory} was prepared with other settings: {'; '.join(differing)}; take another folder, or "
            "delete this one to prepare it anew"
        )
    prepared = load(directory, full)
    if check_sources:
        report_changes(data, prepared)
    return prepared


def _trains(settings: dict[str, Any]) -> bool:
    """Whether the settings ask for a vocabulary that is trained on the text."""
    return settings["vocabulary"] in (None, "sentencepiece")


# ---- writing --------------------------------------------------------------------------------------------------------


class _Preparation:
    """Preparation of a directory in `folder`; it resumes that of an earlier process if the settings are the same."""

    def __init__(
        self,
        data: DataConfig,
        settings: dict[str, Any],
        folder: Path,
        documents: Mapping[str, Iterable[Document | str]] | None,
        progress: bool,
    ):
        self.data, self.settings, self.folder, self.progress = data, settings, folder, progress
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
        self.vocabulary = self.ready_vocabulary(mixture_vocabulary)  # errors are raised before a source is read
        if self.vocabulary is not None and self.has_teacher:
            marks(self.vocabulary, data)

    def run(self) -> None:
        """Read the sources, train or load the vocabulary, tokenise and seal; finished steps are not repeated."""
        for source in self.sources:
            report_left_out(self.field(source), source.name, source.files)
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
        files = {name: _describe(self.folder / name) for name in names}
        counts: dict[str, dict[str, Any]] = {}
        for source in self.sources:
            spool = spools[source.name]
            counts[source.name] = {
                "slug": spool.slug,
                "is_teacher": source.is_teacher,
                "duplicates": spool.duplicates(),
                "changed": 0,  # documents whose tokens do not decode to their text
                **file_description(source),
            }
            for split in SPLITS:
                stem = self.folder / f"{spool.slug}-{split}"
                tokens, changed = _seal(parts[source.name, split], encoder, stem, source.is_teacher, files)
                counts[source.name]["changed"] += changed
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
            "validation_gzip_bits_per_byte": _gzip_bits_per_byte(
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
                    raise ConfigError(f"{self.field(source)}: {error}") from error
        self.check(spools)
        return spools

    def check(self, spools: Mapping[str, Spool]) -> None:
        """Refuse a source without training documents, and a source of text without held-out documents.

        A source whose mixture weight is 0 needs no held-out document.
        """
        fraction = self.data.validation_fraction
        for source in self.sources:
            sizes = {split: len(spools[source.name].splits[split].sizes) for split in SPLITS}
            if not any(sizes.values()):
                raise ConfigError(f"{self.field(source)}: '{source.name}' has no documents (no text at all)")
            if not sizes["train"]:
                raise ConfigError(f"{self.field(source)}: every document of '{source.name}' is held out; add documents")
        weights = self.data.mixture_weights or self.rates or (1.0,) * len(self.sources)
        for source, weight in zip(self.sources, weights, strict=True):
            sizes = {split: len(spools[source.name].splits[split].sizes) for split in SPLITS}
            if weight and not source.is_teacher and not sizes["validation"]:
                by_text = ", hold out by document with data.split_by='text'" * (self.data.split_by == "path")
                raise ConfigError(
                    f"{self.field(source)}: none of the {sizes['train']} documents of '{source.name}' is held out at "
                    f"data.validation_fraction={fraction}: add documents, divide the text into more documents (by two "
                    f"blank lines in .txt files; into more files with data.split_by='path'){by_text}, raise the "
                    f"fraction, or set its data.mixture_weights to 0"
                )

    def field(self, source: Source) -> str:
        """The setting that names a source, for messages."""
        if self.data.mixture is not None:
            return "data.mixture"
        return "data.teachers" if source.is_teacher else "data.sources"

    def ready_vocabulary(self, mixture_vocabulary: Tokenizer | None) -> Tokenizer | None:
        """The vocabulary that data.vocabulary names, else that of the mixture; None: it must be trained on the text."""
        if self.data.vocabulary is None and mixture_vocabulary is not None:
            if self.data.end_id is not None:
                raise ConfigError(f"data.end_id={self.data.end_id} is not read: the mixture's vocabulary has an end id")
            return mixture_vocabulary
        return named_tokenizer(self.data.vocabulary or "sentencepiece", self.data.end_id)

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


def _seal(parts: list[Part], encoder: Encoder, stem: Path, is_teacher: bool, files: dict[str, Any]) -> tuple[int, int]:
    """Join the parts of a split to its token files and describe these in `files`.

    Returns:
        The number of tokens, and that of the documents that do not decode to their text.
    """
    kinds = {"u32": "<u4", "offsets.u64": "<u8", CORRECTIONS: "<i8", **({"weights.u8": "u1"} if is_teacher else {})}
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in kinds}
    hashes = {kind: hashlib.sha256() for kind in kinds}
    total = changed = 0
    with contextlib.ExitStack() as stack:
        opened = {kind: stack.enter_context(path.open("wb")) for kind, path in paths.items()}

        def write(kind: str, array: np.ndarray) -> None:
            raw = array.astype(kinds[kind]).tobytes()
            opened[kind].write(raw)
            hashes[kind].update(raw)

        for part in parts:
            columns = encoder.read(part)
            ends = total + np.cumsum(columns["lengths"])
            write("u32", columns["tokens"])
            write(CORRECTIONS, columns["corrections"] + np.array([total, 0]))
            changed += int(columns["changed"])
            write("offsets.u64", np.concatenate([[total], ends[:-1]]))
            if is_teacher:
                write("weights.u8", columns["weights"])
            total = int(ends[-1])
        write("offsets.u64", np.array([total]))
    if not paths[CORRECTIONS].stat().st_size:
        paths.pop(CORRECTIONS).unlink()
    for kind, path in paths.items():
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hashes[kind].hexdigest()}
    return total, changed


def _gzip_bits_per_byte(spools: Iterable[Spool]) -> float | None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with gzip's header and trailer
    compressed = total = 0
    for spool in spools:
        size = 0
        for text in spool.splits["validation"].read():
            raw = text.encode()
            size += len(raw)
            compressed += len(compressor.compress(raw))
            if size >= GZIP_BYTES:
                break
        total += size
    return 8 * (compressed + len(compressor.flush())) / total if total else None


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
