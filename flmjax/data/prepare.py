"""Documents to token files, once: split by hash, train the tokenizer, encode, and seal the result with checksums.

A prepared directory holds, per source and split, `<slug>-<split>.u32` (the tokens, little-endian) and
`<slug>-<split>.offsets.u64` (where each document starts, and the end), the tokenizer, and meta.json. It is written
under another name and renamed when it is whole, so a directory with a meta.json is never half of one.
"""

import contextlib
import dataclasses
import fcntl
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
from flmjax.data.corpus import read_source
from flmjax.data.spool import SPLITS, Spool
from flmjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

META_FILE = "meta.json"
FORMAT = 1  # of the directory; a change that makes old directories unreadable raises it
TOKENIZER_TEXT_BYTES = 32 << 20  # of training text that a vocabulary is trained on at most
_BATCH_CHARACTERS = 1 << 20  # encoded at a time


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
    sources: Mapping[str, Iterable[str]] | None = None,
    progress: bool = False,
) -> Prepared:
    """Fill `directory` from the documents of `data.sources`, or load it if that was done before.

    `sources` gives the documents from Python, in place of the names' built-in corpora and files; its keys must be
    data.sources. Documents that are only white space are left out. A document is held out if the hash of its text
    says so, hence equal documents are on the same side, also across sources. Memory holds one batch of documents and
    up to 32 MB of text for the vocabulary; the disk holds the text once more while this runs. A process that finds
    another one at work on `directory` waits for it. Text that changes later at the same place is not noticed.

    Raises:
        ConfigError: for a source without documents, for no training or validation documents, text that is not
            Unicode, an unreadable file, or a `directory` that holds something else or was made with other settings
            (the fields are named). Nothing is left behind.
    """
    directory = Path(directory).absolute()
    settings = _settings(data)
    if sources is not None and set(sources) != set(data.sources):
        raise ConfigError(f"sources are {sorted(sources)}, but data.sources are {sorted(data.sources)}")
    if (directory / META_FILE).exists():
        return _load_same(directory, settings)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.with_name(f".{directory.name}.lock")):
        if (directory / META_FILE).exists():  # another process made it while this one waited
            return _load_same(directory, settings)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(f"{directory} exists and is no prepared data ({META_FILE} is missing); choose another")
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run: who holds the lock is alone here
        partial.mkdir()
        try:
            _write(data, settings, partial, sources, progress)
            os.replace(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return load(directory)


def load(directory: Path) -> Prepared:
    """Open a prepared directory after checking every file's length and sha256.

    Raises:
        ConfigError: naming the directory, or the file that is missing, of another length or of other content.
    """
    directory = Path(directory).absolute()
    meta = _read_meta(directory)
    for name, expected in meta["files"].items():
        path = directory / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; delete the folder and prepare again")
        if path.stat().st_size != expected["bytes"]:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}; prepare again")
        if _sha256(path) != expected["sha256"]:
            raise ConfigError(f"{path} has changed: its sha256 is not that of {META_FILE}; prepare again")
    return Prepared(directory, meta, load_tokenizer(directory))


def _settings(data: DataConfig) -> dict[str, Any]:
    """The settings that decide what is in the directory."""
    fields = ["sources", "vocabulary", "validation_fraction", "end_of_document"]
    if data.vocabulary != "bytes":
        fields.append("vocab_size")
    return json.loads(json.dumps({field: getattr(data, field) for field in fields}))


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


def _load_same(directory: Path, settings: dict[str, Any]) -> Prepared:
    there = _read_meta(directory)["settings"]
    names = sorted(there.keys() & settings.keys())  # vocab_size is missing for bytes
    differing = [f"data.{n}={there[n]!r} there, {settings[n]!r} asked" for n in names if there[n] != settings[n]]
    if differing:
        raise ConfigError(f"{directory} was prepared with other settings: {'; '.join(differing)}; choose another one")
    return load(directory)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Alone on this machine until the block ends; the system lets go of a killed process's lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- writing --------------------------------------------------------------------------------------------------------


def _write(
    data: DataConfig,
    settings: dict[str, Any],
    folder: Path,
    sources: Mapping[str, Iterable[str]] | None,
    progress: bool,
) -> None:
    spools = {}
    for source, slug in zip(data.sources, _slugs(data.sources), strict=True):
        documents = read_source(source) if sources is None else sources[source]
        spools[source] = Spool(folder, slug)
        spools[source].fill(_watched(documents, source, progress), source, data.validation_fraction)
    _check_counts(spools, data.validation_fraction)
    tokenizer = _tokenizer(data, spools)
    tokenizer_file = tokenizer.save(folder)
    counts: dict[str, dict[str, Any]] = {}
    names = [tokenizer_file.name]
    for source, spool in spools.items():
        counts[source] = {"slug": spool.slug}
        for split in SPLITS:
            name = f"{spool.slug}-{split}"
            texts = _watched(spool.read(split), f"{source} {split} to tokens", progress, len(spool.sizes[split]))
            tokens = _encode(texts, tokenizer, folder / name, data.end_of_document)
            counts[source][split] = {
                "documents": len(spool.sizes[split]),
                "tokens": tokens,
                "bytes": sum(spool.sizes[split]),
            }
            names += [f"{name}.u32", f"{name}.offsets.u64"]
    meta = {
        "format": FORMAT,
        "settings": settings,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_id": tokenizer.end_id,
        },
        "sources": counts,
        "validation_gzip_bits_per_byte": _gzip_bits_per_byte(spools.values()),
        "files": {n: {"bytes": (folder / n).stat().st_size, "sha256": _sha256(folder / n)} for n in names},
    }
    for spool in spools.values():
        spool.delete()
    (folder / META_FILE).write_text(json.dumps(meta, indent=1, ensure_ascii=False))


def _slugs(sources: tuple[str, ...]) -> list[str]:
    """File names for the sources: their letters and digits, and a part of the hash where that is not all of it."""
    slugs = []
    for source in sources:
        plain = re.sub(r"[^a-z0-9_]", "-", source.lower()).strip("-")[-40:]
        slugs.append(plain if plain == source else f"{plain}-{hashlib.sha256(source.encode()).hexdigest()[:8]}")
    return slugs


def _watched(items: Iterable[str], label: str, progress: bool, total: int | None = None) -> Iterator[str]:
    # disable=None: silent where standard error is no terminal
    return iter(tqdm(items, label, total, unit=" documents", leave=False, disable=None if progress else True))


def _check_counts(spools: Mapping[str, Spool], fraction: float) -> None:
    for source, spool in spools.items():
        if not any(spool.sizes.values()):
            raise ConfigError(f"data.sources: '{source}' has no documents (no text at all)")
        if not spool.sizes["train"]:
            raise ConfigError(f"data.sources: every document of '{source}' is held out; add documents")
    if not any(spool.sizes["validation"] for spool in spools.values()):
        total = sum(len(spool.sizes["train"]) for spool in spools.values())
        raise ConfigError(
            f"none of the {total} documents is held out at data.validation_fraction={fraction}: add documents, part "
            f"the text into more of them (by two blank lines in .txt files), or raise the fraction"
        )


def _tokenizer(data: DataConfig, spools: Mapping[str, Spool]) -> Tokenizer:
    if data.vocabulary == "bytes":
        return ByteTokenizer()
    total = sum(sum(spool.sizes["train"]) for spool in spools.values())
    texts = (text for spool in spools.values() for text in spool.read("train"))
    return SentencePieceTokenizer.train(texts, data.vocab_size, keep=min(1.0, TOKENIZER_TEXT_BYTES / total))


def _encode(texts: Iterable[str], tokenizer: Tokenizer, stem: Path, end_of_document: bool) -> int:
    """Write the streams of tokens and offsets; returns the number of tokens."""
    end = np.array([tokenizer.end_id] if end_of_document else [], "<u4")
    total = 0
    with (
        stem.with_name(f"{stem.name}.u32").open("wb") as tokens,
        stem.with_name(f"{stem.name}.offsets.u64").open("wb") as offsets,
    ):
        for batch in _batches(texts):
            for ids in tokenizer.encode_batch(batch):
                offsets.write(np.array([total], "<u8").tobytes())
                tokens.write(np.concatenate([ids.astype("<u4"), end]).tobytes())
                total += len(ids) + len(end)
        offsets.write(np.array([total], "<u8").tobytes())
    return total


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _gzip_bits_per_byte(spools: Iterable[Spool]) -> float:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with gzip's header and trailer
    compressed = size = 0
    for spool in spools:
        for text in spool.read("validation"):
            raw = text.encode()
            size += len(raw)
            compressed += len(compressor.compress(raw))
    return 8 * (compressed + len(compressor.flush())) / size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
