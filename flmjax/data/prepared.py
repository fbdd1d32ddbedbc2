"""`Prepared`: an opened directory of token files, which training reads.

The directory holds meta.json, the tokenizer's files, and for each source and split, of D documents and T tokens:
    <slug>-<split>.u32           tokens, little-endian uint32 (T,)
    <slug>-<split>.offsets.u64   first token of each document, then T: little-endian uint64 (D + 1,)
    <slug>-<split>.weights.u8    of teachers: loss weight of each token as a target, uint8 (T,): 0, COUNTS or DECISIVE
    <slug>-<split>.bytes.i64     only where a vocabulary changes text (round_trip.py): token, correction of its bytes,
                                 little-endian int64 (n, 2)
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flmjax.config import ConfigError, RunConfig, stored_entry
from flmjax.config.validate import refuse_cudnn
from flmjax.data.sources.freelm import Marks
from flmjax.data.tokenizers import Tokenizer, load_tokenizer

META_FILE = "meta.json"
VERIFIED_FILE = "verified.json"  # size, time and inode of each file when its checksum was last correct
FORMAT = 1  # of the directory; a change that makes old directories unreadable raises it
CORRECTIONS = "bytes.i64"  # end of the names of the files with corrections of bytes
MIN_HELD_OUT = 10  # documents; the validation loss of fewer is not reliable
COUNTS, DECISIVE = 1, 2  # loss weights: the target is in the loss; it also decides the judgement


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A verified directory of token files.

    Attributes:
        meta: the content of meta.json: settings, files, and counts for each source and split.
        tokenizer: of all sources.
    """

    directory: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer, the end token included."""
        return self.tokenizer.vocab_size

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources in the order of the mixture weights: data.sources, then data.teachers; or the Tasks of
        data.mixture."""
        return tuple(self.meta["sources"])

    @property
    def validation_gzip_bits_per_byte(self) -> float:
        """Compression of all held-out text together by gzip -9: a baseline for a model's bits per byte."""
        return self.meta["validation_gzip_bits_per_byte"]

    def tokens(self, source: str, split: str) -> np.ndarray:
        """Token stream of a source, uint32 (T,), mapped from disk."""
        return self._map(f"{self._slug(source)}-{split}.u32", "<u4")

    def offsets(self, source: str, split: str) -> np.ndarray:
        """First token of each of the D documents in `tokens`, then T: uint64 (D + 1,), mapped from disk."""
        return self._map(f"{self._slug(source)}-{split}.offsets.u64", "<u8")

    def num_tokens(self, source: str, split: str) -> int:
        """Number of tokens of a source, end tokens included."""
        return self.meta["sources"][source][split]["tokens"]

    def loss_weights(self, source: str, split: str) -> np.ndarray | None:
        """Loss weight of each token of a teacher as a target, uint8 (T,): 0, COUNTS or DECISIVE.

        None for text: all its tokens are in the loss.
        """
        return self._map(f"{self._slug(source)}-{split}.weights.u8", "u1") if self.is_teacher(source) else None

    def byte_corrections(self, source: str, split: str) -> np.ndarray:
        """Corrections of a source's tokens, mapped from disk, int64 (n, 2), in the order of the tokens.

        Each is the index of a token in `tokens`, and the UTF-8 bytes of text that it stands for less token_bytes of its
        id; other tokens have no correction.
        """
        name = f"{self._slug(source)}-{split}.{CORRECTIONS}"
        return self._map(name, "<i8").reshape(-1, 2) if name in self.meta["files"] else np.zeros((0, 2), np.int64)

    def is_teacher(self, source: str) -> bool:
        """Whether a source is a teacher's: propositions, not text."""
        return self.meta["sources"][source].get("is_teacher", False)

    @property
    def marks(self) -> Marks | None:
        """Ids of the marks for true and false; None if no source is a teacher's."""
        stored = self.meta.get("marks")
        return None if stored is None else Marks(tuple(stored["true"]), tuple(stored["false"]), stored["differs"])

    @property
    def rates(self) -> tuple[float, ...] | None:
        """Rates of the Tasks of data.mixture; None if the data are no seqio mixture."""
        rates = self.meta.get("rates")
        return None if rates is None else tuple(rates)

    def checksums(self, source: str, split: str) -> tuple[str, str]:
        """sha256 (hexadecimal) of the tokens and of the offsets."""
        name = f"{self._slug(source)}-{split}"
        return self._checksum(f"{name}.u32"), self._checksum(f"{name}.offsets.u64")

    def loss_weights_checksum(self, source: str, split: str) -> str:
        """sha256 (hexadecimal) of the loss weights of a teacher."""
        return self._checksum(f"{self._slug(source)}-{split}.weights.u8")

    def _checksum(self, name: str) -> str:
        return self.meta["files"][name]["sha256"]

    def _slug(self, source: str) -> str:
        return self.meta["sources"][source]["slug"]

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.directory / name
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)  # mmap refuses 0 bytes


def with_vocabulary(config: RunConfig, data: Prepared) -> RunConfig:
    """The config with model.vocab_size from the tokenizer.

    Raises:
        ConfigError: for another vocab_size in the config, and for an attention backend that cannot keep the
            propositions of teachers apart.
    """
    if config.model.vocab_size not in (None, data.vocab_size):
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} but the data's vocabulary has {data.vocab_size} ids; "
            "leave it None to take the tokenizer's"
        )
    if data.marks is not None:  # a seqio mixture may have teachers
        refuse_cudnn(config, f"the teacher data in {data.directory}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=data.vocab_size))


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """A different short name of each source, of letters, digits, "_", "." and "-": the end of its path."""
    parts = [[part for part in re.split(r"[/\\]", name) if part] for name in names]
    for length in range(1, max(1, *map(len, parts)) + 1):
        ends = ["/".join(of_name[-length:]) for of_name in parts]
        short = tuple(re.sub(r"[^\w.-]+", "_", end).strip("_") or "source" for end in ends)
        if len(set(short)) == len(names):
            return short
    return tuple(f"{i}_{name}" for i, name in enumerate(short))


def data_warnings(sources: Mapping[str, Any], length: int) -> list[str]:
    """Lines that a reader of results must know: sources with little held-out text, texts that a vocabulary changes.

    Args:
        sources: the entry "sources" of meta.json.
        length: tokens of a sequence.
    """
    lines = []
    for name, counts in sources.items():
        documents, tokens = counts["validation"]["documents"], counts["validation"]["tokens"]
        if documents < MIN_HELD_OUT or tokens <= length:
            few = f"{documents} documents, fewer than {MIN_HELD_OUT}"
            short = f"{tokens:,} tokens, which do not fill a sequence of {length:,}"
            lines.append(
                f"source '{name}': its validation loss is not reliable: the held-out text has "
                f"{few if documents < MIN_HELD_OUT else short}; add documents or raise data.validation_fraction"
            )
        if counts.get("changed"):
            total = sum(counts[split]["documents"] for split in ("train", "validation"))
            lines.append(
                f"source '{name}': the tokens of {counts['changed']:,} of {total:,} documents do not decode to the "
                "same text: the vocabulary normalises it or has no piece for some characters"
            )
    return lines


def load(directory: Path, full: bool = False, is_trusted: bool = False) -> Prepared:
    """Open a prepared directory after checking the length and the sha256 of every file.

    Unless `full`, a file whose size and time have not changed since its checksum was last correct is not read again:
    reading terabytes takes longer than a run should take to start. With `is_trusted`, no file is read: another process
    of the run has checked them.

    Raises:
        ConfigError: naming the directory, or the file that is missing, of another length or of other content.
    """
    directory = Path(directory).absolute()
    meta = read_meta(directory)
    verified = {} if full else _read_verified(directory)
    stamps: dict[str, list[int]] = {}
    for name, expected in meta["files"].items():
        path = directory / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; delete the folder and prepare again")
        stat = path.stat()
        if stat.st_size != expected["bytes"]:
            raise ConfigError(f"{path} has {stat.st_size} bytes, not {expected['bytes']}; prepare again")
        stamps[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if not is_trusted and verified.get(name) != stamps[name] and sha256(path) != expected["sha256"]:
            raise ConfigError(f"{path} has changed: its sha256 is not that of {META_FILE}; prepare again")
    if verified != stamps and not is_trusted:
        with contextlib.suppress(OSError):  # the directory may be read-only
            (directory / VERIFIED_FILE).write_text(json.dumps(stamps), encoding="utf-8")
    return Prepared(directory, meta, load_tokenizer(directory))


def _read_verified(directory: Path) -> dict[str, list[int]]:
    try:
        return json.loads((directory / VERIFIED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_meta(directory: Path) -> dict[str, Any]:
    """The content of meta.json in `directory`.

    Raises:
        ConfigError: if the file is missing, cannot be read, is of another format, or lacks an entry.
    """
    path = directory / META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        stored_format = meta["format"]
    except FileNotFoundError:
        raise ConfigError(f"{directory} holds no prepared data ({META_FILE} is missing)") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} cannot be read as the description of prepared data; prepare again") from None
    if stored_format != FORMAT:
        raise ConfigError(f"{path} is of format {stored_format}, this version reads {FORMAT}; prepare again")
    stored_entry(meta, "settings", dict, str(path))
    stored_entry(meta, "validation_gzip_bits_per_byte", float, str(path))
    files = stored_entry(meta, "files", dict, str(path))
    for file in files:
        entry, name = stored_entry(files, file, dict, str(path)), f"{path}: the file '{file}'"
        stored_entry(entry, "bytes", int, name)
        stored_entry(entry, "sha256", str, name)
    sources = stored_entry(meta, "sources", dict, str(path))
    check_sources(sources, path)
    for source, counts in sources.items():
        stored_entry(counts, "slug", str, f"{path}: the source '{source}'")
    return meta


def check_sources(sources: Mapping[str, Any], path: Path) -> None:
    """Check the entry "sources" of the meta.json in `path`.

    Raises:
        ConfigError: naming the file, the source and the count that is absent or no count.
    """
    for source in sources:
        counts, name = stored_entry(sources, source, dict, str(path)), f"{path}: the source '{source}'"
        for split in ("train", "validation"):
            for unit in ("documents", "tokens"):
                stored_entry(stored_entry(counts, split, dict, name), unit, int, f"{name}, {split}")


def sha256(path: Path) -> str:
    """sha256 (hexadecimal) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
