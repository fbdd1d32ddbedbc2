"""A directory of token files, opened: what training reads.

It holds, per source and split, `<slug>-<split>.u32` (the tokens, little-endian), `<slug>-<split>.offsets.u64` (where
each document starts, and the end) and, of teachers, `<slug>-<split>.weights.u8` (loss weight of each token as a target;
all tokens of text count), the tokenizer, and meta.json.
"""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from flmjax.config import ConfigError, RunConfig
from flmjax.data.sources.freelm import Marks
from flmjax.data.tokenizers import Tokenizer, load_tokenizer

META_FILE = "meta.json"
VERIFIED_FILE = "verified.json"  # sizes and times of the files whose checksums were found right
FORMAT = 1  # of the directory; a change that makes old directories unreadable raises it


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


def with_vocabulary(config: RunConfig, data: Prepared) -> RunConfig:
    """Fill in model.vocab_size from the tokenizer, or check it against that."""
    if config.model.vocab_size not in (None, data.vocab_size):
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} but the data's vocabulary has {data.vocab_size} ids; "
            "leave it None to take the tokenizer's"
        )
    if data.marks is not None and config.model.attention == "cudnn":  # of a mixture, known only now
        raise ConfigError(
            f"model.attention='cudnn' cannot keep a row's propositions apart, and {data.directory} has teachers; take "
            "'plain'"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=data.vocab_size))


def load(directory: Path, full: bool = False) -> Prepared:
    """Open a prepared directory after checking every file's length and sha256.

    A file of the size and time at which its checksum was last found right is not read again, unless `full`: terabytes
    take longer to read than a run should take to start.

    Raises:
        ConfigError: naming the directory, or the file that is missing, of another length or of other content.
    """
    directory = Path(directory).absolute()
    meta = read_meta(directory)
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
        if verified.get(name) != found[name] and sha256(path) != expected["sha256"]:
            raise ConfigError(f"{path} has changed: its sha256 is not that of {META_FILE}; prepare again")
    if verified != found:
        with contextlib.suppress(OSError):  # the directory may lie where nobody can write
            (directory / VERIFIED_FILE).write_text(json.dumps(found))
    return Prepared(directory, meta, load_tokenizer(directory))


def _read_verified(directory: Path) -> dict[str, list[int]]:
    try:
        return json.loads((directory / VERIFIED_FILE).read_text())
    except (OSError, ValueError):
        return {}


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of `directory`.

    Raises:
        ConfigError: when it is not there, is none, or is of another format.
    """
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


def sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
