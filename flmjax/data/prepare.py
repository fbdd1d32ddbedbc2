"""Documents to token files, once: split by hash, train the tokenizer, encode, and seal the result with checksums.

A prepared directory holds, per source and split, `<slug>-<split>.u32` (the tokens, little-endian),
`<slug>-<split>.offsets.u64` (where each document starts, and the end) and, of teachers, `<slug>-<split>.weights.u8`
(loss weight of each token as a target; all tokens of text count), the tokenizer, and meta.json. It is written under
another name and renamed when it is whole, so a directory with a meta.json is never half of one. What a killed process
had done by then is taken up by the next: sources that were read, parts that were tokenised.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flmjax.config import ConfigError, DataConfig
from flmjax.data.corpus import text_source
from flmjax.data.documents import Document, Source
from flmjax.data.encode import Encoder, Part, encode_parts, split_parts
from flmjax.data.freelm import Marks, marks, teacher_source
from flmjax.data.spool import SPLITS, Spool
from flmjax.data.tokenizers import (
    MODEL_FILE,
    SETTINGS_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    named_tokenizer,
)

META_FILE = "meta.json"
PROGRESS_FILE = "progress.json"  # while the directory is being made: its settings and sources
VOCABULARY_FILE = "vocabulary.txt"  # while the directory is being made: the fingerprint that its parts have
VERIFIED_FILE = "verified.json"  # sizes and times of the files whose checksums were found right
FORMAT = 1  # of the directory; a change that makes old directories unreadable raises it
TOKENIZER_TEXT_BYTES = 32 << 20  # of training text that a vocabulary is trained on at most
GZIP_BYTES = 16 << 20  # of a source's held-out text that gzip is measured on at most


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared directory, verified. `meta` is meta.json: settings, files, counts per source and split."""

    directory: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, the end token included."""
        return self.tokenizer.vocab_size

    @property
    def sources(self) -> tuple[str, ...]:
        """Names as in DataConfig.sources, in that order."""
        return tuple(self.meta["sources"])

    @property
    def validation_gzip_bits_per_byte(self) -> float:
        """What gzip -9 makes of the held-out text of all sources together: a line for a model to beat."""
        return self.meta["validation_gzip_bits_per_byte"]

    def tokens(self, source: str, split: str) -> np.ndarray:
        """The token stream of a source, uint32 (T,), mapped from disk."""
        return self._map(f"{self._slug(source)}-{split}.u32", "<u4")

    def offsets(self, source: str, split: str) -> np.ndarray:
        """Where each of the D documents starts in `tokens`, and the end: uint64 (D + 1,), mapped from disk."""
        return self._map(f"{self._slug(source)}-{split}.offsets.u64", "<u8")

    def num_tokens(self, source: str, split: str) -> int:
        """Tokens of a source, end tokens included."""
        return self.meta["sources"][source][split]["tokens"]

    def weights(self, source: str, split: str) -> np.ndarray | None:
        """Loss weight of each of a teacher's tokens as target, uint8 (T,): 0, 1, or 2 where the judgement is decided;
        None for text: all count."""
        return self._map(f"{self._slug(source)}-{split}.weights.u8", "u1") if self.is_teacher(source) else None

    def is_teacher(self, source: str) -> bool:
        """Whether a source gives propositions, not text."""
        return self.meta["sources"][source].get("is_teacher", False)

    @property
    def marks(self) -> Marks | None:
        """Ids of the marks that stand for true and false; None without teachers."""
        stored = self.meta.get("marks")
        return None if stored is None else Marks(tuple(stored["true"]), tuple(stored["false"]), stored["differs"])

    @property
    def rates(self) -> tuple[float, ...] | None:
        """Shares of samples that a seqio mixture gives its sources; None without one."""
        rates = self.meta.get("rates")
        return None if rates is None else tuple(rates)

    def checksums(self, source: str, split: str) -> tuple[str, str]:
        """sha256 of the tokens and of the offsets."""
        name = f"{self._slug(source)}-{split}"
        files = self.meta["files"]
        return files[f"{name}.u32"]["sha256"], files[f"{name}.offsets.u64"]["sha256"]

    def _slug(self, source: str) -> str:
        return self.meta["sources"][source]["slug"]

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.directory / name
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)  # mmap refuses 0 bytes


def prepare(
    data: DataConfig,
    directory: Path,
    *,
    sources: Mapping[str, Iterable[Document | str]] | None = None,
    progress: bool = False,
    full_check: bool = False,
) -> Prepared:
    """Fill `directory` from the documents of `data`'s sources, or load it if that was done before.

    `sources` gives the documents from Python, in place of the names' built-in corpora and files; its keys must be
    data.sources and data.teachers. `full_check` is `full` of load. Documents that are only white space are left out.
    A document is held out if the hash of its key says so, or of its text if it has none: documents of one key are on
    one side, and so are equal texts without keys, also across sources; meta.json counts the texts that are on both.

    Memory holds some parts of 4 to 32 MB of text for each process and a few bytes a document; the disk holds the text
    and the tokens once more while this runs. Processes are started for 16 MB of text or more: a script that calls this
    needs Python's `if __name__ == "__main__":`. A process that finds another one at work on `directory` waits for it.
    Text that changes later at the same place is not noticed.

    Raises:
        ConfigError: for a source without documents, for no training or validation documents, text that is not
            Unicode, an unreadable file, marks that the vocabulary cannot tell apart, or a `directory` that holds
            something else or was made with other settings (the fields are named). Nothing is left behind.
    """
    directory = Path(directory).absolute()
    settings = _settings(data)
    names = (*data.sources, *data.teachers)
    if sources is not None and set(sources) != set(names):
        raise ConfigError(f"sources are {sorted(sources)}, but data.sources and data.teachers are {sorted(names)}")
    if (directory / META_FILE).exists():
        return _load_same(directory, settings, full_check)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.with_name(f".{directory.name}.lock")):
        if (directory / META_FILE).exists():  # another process made it while this one waited
            return _load_same(directory, settings, full_check)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(f"{directory} exists and is no prepared data ({META_FILE} is missing); choose another")
        partial = directory.with_name(f".{directory.name}.partial")  # who holds the lock is alone here
        try:
            _Preparation(data, settings, partial, sources, progress).run()
            os.replace(partial, directory)
        except ConfigError:  # what a kill, an interrupt or a full disk leaves is gone on with
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return load(directory)


def load(directory: Path, full: bool = False) -> Prepared:
    """Open a prepared directory after checking every file's length and sha256.

    A file of the size and time at which its checksum was last found right is not read again, unless `full`: terabytes
    take longer to read than a run should take to start.

    Raises:
        ConfigError: naming the directory, or the file that is missing, of another length or of other content.
    """
    directory = Path(directory).absolute()
    meta = _read_meta(directory)
    verified = {} if full else _read_verified(directory)
    found: dict[str, list[int]] = {}
    for name, expected in meta["files"].items():
        path = directory / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; delete the folder and prepare again")
        stat = path.stat()
        if stat.st_size != expected["bytes"]:
            raise ConfigError(f"{path} has {stat.st_size} bytes, not {expected['bytes']}; prepare again")
        found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if verified.get(name) != found[name] and _sha256(path) != expected["sha256"]:
            raise ConfigError(f"{path} has changed: its sha256 is not that of {META_FILE}; prepare again")
    if verified != found:
        with contextlib.suppress(OSError):  # the directory may lie where nobody can write
            (directory / VERIFIED_FILE).write_text(json.dumps(found))
    return Prepared(directory, meta, load_tokenizer(directory))


def _settings(data: DataConfig) -> dict[str, Any]:
    """The settings that decide what is in the directory."""
    fields = ["vocabulary", "end_id", "validation_fraction", "split_by", "end_of_document"]
    fields += ["sources", "teachers"] if data.mixture is None else ["mixture"]
    if data.vocabulary in (None, "sentencepiece"):
        fields.append("vocab_size")
    if data.mixture is not None or data.teachers:
        fields += ["true_mark", "false_mark"]
    settings = {field: getattr(data, field) for field in fields}
    if data.mixture is None and data.vocabulary is None:
        settings["vocabulary"] = "sentencepiece"
    return json.loads(json.dumps(settings))


def _read_verified(directory: Path) -> dict[str, list[int]]:
    try:
        return json.loads((directory / VERIFIED_FILE).read_text())
    except (OSError, ValueError):
        return {}


def _read_meta(directory: Path) -> dict[str, Any]:
    path = directory / META_FILE
    try:
        meta = json.loads(path.read_text())
        found = meta["format"]
    except FileNotFoundError:
        raise ConfigError(f"{directory} holds no prepared data ({META_FILE} is missing)") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} cannot be read as the description of prepared data; prepare again") from None
    if found != FORMAT:
        raise ConfigError(f"{path} is of format {found}, this version reads {FORMAT}; prepare again")
    return meta


def _load_same(directory: Path, settings: dict[str, Any], full: bool) -> Prepared:
    default = _settings(DataConfig())
    there = {**default, **_read_meta(directory)["settings"]}
    asked = {**default, **settings}
    names = [n for n in sorted(there.keys() | asked.keys()) if n != "vocab_size" or (_trains(there) and _trains(asked))]
    differing = [
        f"data.{n}={there.get(n)!r} there, {asked.get(n)!r} asked" for n in names if there.get(n) != asked.get(n)
    ]
    if differing:
        raise ConfigError(f"{directory} was prepared with other settings: {'; '.join(differing)}; choose another one")
    return load(directory, full)


def _trains(settings: dict[str, Any]) -> bool:
    return settings["vocabulary"] in (None, "sentencepiece")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Alone on this machine until the block ends; the system lets go of a killed process's lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- writing --------------------------------------------------------------------------------------------------------


class _Preparation:
    """The making of a directory in `folder`, from where an earlier process left it if that asked for the same."""

    def __init__(
        self,
        data: DataConfig,
        settings: dict[str, Any],
        folder: Path,
        given: Mapping[str, Iterable[Document | str]] | None,
        progress: bool,
    ):
        self.data, self.settings, self.folder, self.progress = data, settings, folder, progress
        self.rates: tuple[float, ...] | None = None
        vocabulary: Tokenizer | None = None  # of the mixture
        self.provenance: dict[str, Any] = {}
        if given is not None:
            names = (*data.sources, *data.teachers)
            self.sources = [Source(n, functools.partial(iter, given[n]), n in data.teachers) for n in names]
        elif data.mixture is not None:
            from flmjax.data.tasks import read_mixture  # TensorFlow: 5 s, and an optional package

            mixture = read_mixture(data)
            self.sources, self.rates = list(mixture.sources), mixture.weights
            vocabulary, self.provenance = mixture.vocabulary, mixture.provenance
            if data.weights is not None and len(data.weights) != len(self.sources):
                tasks = [source.name for source in self.sources]
                raise ConfigError(
                    f"data.weights has {len(data.weights)} entries for the {len(tasks)} tasks of data.mixture="
                    f"'{data.mixture}': {', '.join(tasks)}; None takes the mixture's rates"
                )
        else:
            self.sources = [text_source(name, data.split_by) for name in data.sources]
            self.sources += [teacher_source(name, data) for name in data.teachers]
        self.slugs = _slugs(tuple(source.name for source in self.sources))
        self.has_teacher = any(source.is_teacher for source in self.sources)
        self.vocabulary = self.ready_vocabulary(vocabulary)  # what is wrong with it is said before anything is read
        if self.vocabulary is not None and self.has_teacher:
            marks(self.vocabulary, data)

    def run(self) -> None:
        """Do all that is not done, in order: read, train or load the vocabulary, tokenise, seal."""
        self.open()
        spools = self.read()
        tokenizer = self.vocabulary or self.train_vocabulary(spools)
        names = self.save_vocabulary(tokenizer)
        own_marks = marks(tokenizer, self.data) if self.has_teacher else None
        encoder = Encoder(tokenizer, self.data.end_of_document, own_marks)
        parts = {
            (name, split): split_parts(spool.splits[split], self.folder, f"{spool.slug}-{split}")
            for name, spool in spools.items()
            for split in SPLITS
        }
        everything = [part for own in parts.values() for part in own]
        encode_parts(everything, encoder, self.folder, self.data.workers, self.progress)
        files = {name: _describe(self.folder / name) for name in names}
        counts: dict[str, dict[str, Any]] = {}
        for source in self.sources:
            spool = spools[source.name]
            counts[source.name] = {
                "slug": spool.slug,
                "is_teacher": source.is_teacher,
                "duplicates": spool.duplicates(),
            }
            for split in SPLITS:
                own = parts[source.name, split]
                tokens = _seal(own, encoder, self.folder / f"{spool.slug}-{split}", source.is_teacher, files)
                sizes = spool.splits[split].sizes
                counts[source.name][split] = {"documents": len(sizes), "tokens": tokens, "bytes": int(sizes.sum())}
        hashes = {s: np.concatenate([spool.splits[s].hashes for spool in spools.values()]) for s in SPLITS}
        everything_read = np.concatenate(list(hashes.values()))
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
            "duplicates": len(everything_read) - len(np.unique(everything_read)),
            "held_out_in_training": len(np.intersect1d(hashes["train"], hashes["validation"])),
            "validation_gzip_bits_per_byte": _gzip_bits_per_byte(
                spools[source.name] for source in self.sources if not source.is_teacher
            ),
            "files": files,
        }
        for part in everything:
            part.path.unlink()
        for spool in spools.values():
            spool.delete()
        (self.folder / PROGRESS_FILE).unlink()
        (self.folder / VOCABULARY_FILE).unlink()
        (self.folder / META_FILE).write_text(json.dumps(meta, indent=1, ensure_ascii=False))

    def open(self) -> None:
        """Make the folder, or keep of it what a process with the same settings has read of the same text."""
        progress = self.folder / PROGRESS_FILE
        wanted = {"settings": self.settings, "stamps": {source.name: source.stamp for source in self.sources}}
        try:
            found = json.loads(progress.read_text())
            same = found["settings"] == self.settings and list(found["stamps"]) == list(wanted["stamps"])
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        elif None in wanted["stamps"].values() or found != wanted:
            for source, slug in zip(self.sources, self.slugs, strict=True):
                if source.stamp is None or source.stamp != found["stamps"][source.name]:
                    Spool(self.folder, slug).forget()
            for part in self.folder.glob("*.part*"):  # their vocabulary may have been trained on the old text
                part.unlink()
        progress.write_text(json.dumps(wanted))

    def read(self) -> dict[str, Spool]:
        """The documents of every source, on disk."""
        spools = {}
        for source, slug in zip(self.sources, self.slugs, strict=True):
            spools[source.name] = spool = Spool(self.folder, slug)
            if not spool.reload():
                documents = _watched(source.read(), source.name, self.progress)
                try:
                    spool.fill(documents, source.name, self.data.validation_fraction, source.is_teacher)
                except ConfigError as error:
                    field = "data.teachers" if source.is_teacher else "data.sources"
                    raise ConfigError(f"{field if self.data.mixture is None else 'data.mixture'}: {error}") from error
        self.check(spools)
        return spools

    def check(self, spools: Mapping[str, Spool]) -> None:
        """Refuse sources without training documents, or no held-out text at all."""
        fraction = self.data.validation_fraction
        for source in self.sources:
            sizes = {split: len(spools[source.name].splits[split].sizes) for split in SPLITS}
            field = "data.teachers" if source.is_teacher else "data.sources"
            field = field if self.data.mixture is None else "data.mixture"
            if not any(sizes.values()):
                raise ConfigError(f"{field}: '{source.name}' has no documents (no text at all)")
            if not sizes["train"]:
                raise ConfigError(f"{field}: every document of '{source.name}' is held out; add documents")
        texts = [spools[source.name] for source in self.sources if not source.is_teacher]
        if texts and not any(len(spool.splits["validation"].sizes) for spool in texts):
            total = sum(len(spool.splits["train"].sizes) for spool in texts)
            raise ConfigError(
                f"none of the {total} documents is held out at data.validation_fraction={fraction}: add documents, "
                f"part the text into more of them (by two blank lines in .txt files; into more files with "
                f"data.split_by='path'), or raise the fraction"
            )

    def ready_vocabulary(self, of_mixture: Tokenizer | None) -> Tokenizer | None:
        """The vocabulary asked for, else the mixture's; None for one that is trained on the text."""
        if self.data.vocabulary is None and of_mixture is not None:
            if self.data.end_id is not None:
                raise ConfigError(f"data.end_id={self.data.end_id} is not read: the mixture's vocabulary has its own")
            return of_mixture
        return named_tokenizer(self.data.vocabulary or "sentencepiece", self.data.end_id)

    def train_vocabulary(self, spools: Mapping[str, Spool]) -> Tokenizer:
        """A SentencePiece model of the training text."""
        total = sum(int(spool.splits["train"].sizes.sum()) for spool in spools.values())
        texts = (text for spool in spools.values() for text in spool.splits["train"].read())
        keep = min(1.0, TOKENIZER_TEXT_BYTES / total)
        return SentencePieceTokenizer.train(texts, self.data.vocab_size, keep=keep)

    def save_vocabulary(self, tokenizer: Tokenizer) -> list[str]:
        """Write it and return its files' names; parts that an earlier process made with another one are removed."""
        path = self.folder / VOCABULARY_FILE
        if not path.exists() or path.read_text() != tokenizer.fingerprint:
            for old in (*self.folder.glob("*.part*"), self.folder / MODEL_FILE, self.folder / SETTINGS_FILE):
                old.unlink(missing_ok=True)
            path.write_text(tokenizer.fingerprint)
        return [saved.name for saved in tokenizer.save(self.folder)]


def _slugs(sources: tuple[str, ...]) -> list[str]:
    """File names for the sources: their letters and digits, and a part of the hash where that is not all of it."""
    slugs = []
    for source in sources:
        plain = re.sub(r"[^a-z0-9_]", "-", source.lower()).strip("-")[-40:]
        slugs.append(plain if plain == source else f"{plain}-{hashlib.sha256(source.encode()).hexdigest()[:8]}")
    return slugs


def _watched(items: Iterable[Any], label: str, progress: bool) -> Iterator[Any]:
    # disable=None: silent where standard error is no terminal
    return iter(tqdm(items, label, unit=" documents", leave=False, disable=None if progress else True))


def _seal(parts: list[Part], encoder: Encoder, stem: Path, is_teacher: bool, files: dict[str, Any]) -> int:
    """Lay the parts end to end, describing each file in `files`; returns the number of tokens."""
    kinds = {"u32": "<u4", "offsets.u64": "<u8", **({"weights.u8": "u1"} if is_teacher else {})}
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in kinds}
    hashes = {kind: hashlib.sha256() for kind in kinds}
    total = 0
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
            write("offsets.u64", np.concatenate([[total], ends[:-1]]))
            if is_teacher:
                write("weights.u8", columns["weights"])
            total = int(ends[-1])
        write("offsets.u64", np.array([total]))
    for kind, path in paths.items():
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hashes[kind].hexdigest()}
    return total


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
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
