"""Text to ids and back: SentencePiece (trained on the sources, or a model file), plain bytes, or OpenAI's cl100k.

All tokenizers have the same members. `end_id` ends a document, and no text is ever encoded to it, whatever the text
spells. decode(encode(text)) is the text for a SentencePiece model that `train` returns, for bytes and for cl100k; a
SentencePiece model of another origin may normalise text, which round_trip.py measures.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from flmjax.config import ConfigError
from flmjax.data.vocabulary_training import train_model

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
MODEL_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer.json"

CHUNK = 50_000  # characters encoded at once: at 4 bytes each, at most the 200,000 ids that bpe_openai can return
GROUP = 100  # chunks that SentencePiece's threads share: up to 5,000,000 ids as Python numbers
# Patterns that match up to the last place of a chunk at which every piece ends. In a model that `train` returns no
# piece has a line break after another character. In cl100k no match of the regular expression, white space aside, has
# a space after a character, or a character after a line break.
LINE_BORDER = re.compile(r".+(?<=[^\n])(?=\n)", re.DOTALL)
CL100K_BORDER = re.compile(r".+(?:(?<=\S)(?= )|(?<=\n)(?=\S))", re.DOTALL)
CL100K_TEXT_IDS, CL100K_IDS = 100_256, 100_277  # id 100256 is unused, those above are control tokens


class SentencePieceTokenizer:
    """A serialised SentencePiece model.

    A model that `train` returns has byte fallback and no normalisation: decode(encode(text)) == text for every str that
    UTF-8 can hold. Another model loses what its normalisation and its unknown piece lose.

    Text of more than `CHUNK` characters is encoded in chunks that begin with a line break, which changes no id of a
    model that `train` returns. A chunk without a line break ends at any character.

    Args:
        model: the bytes of a .model file.
        end_id: a control piece, or the first id above the model's ids. None: the model's end-of-sentence piece.

    Raises:
        ConfigError: for a model without an end-of-sentence piece, or an `end_id` that text could produce.
        RuntimeError: for bytes that are no model.
    """

    def __init__(self, model: bytes, end_id: int | None = None):
        self._model = model
        self.processor = processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model)
        size = processor.vocab_size()
        self.end_id = processor.eos_id() if end_id is None else end_id
        if self.end_id == -1:
            raise ConfigError("the SentencePiece model has no end-of-sentence piece; set data.end_id")
        if self.end_id != size and not (0 <= self.end_id < size and processor.is_control(self.end_id)):
            raise ConfigError(
                f"data.end_id={end_id} is no control piece of the SentencePiece model: text could produce it; "
                f"take one, or {size}, the first free id"
            )
        self._ends_with_eos = self.end_id == processor.eos_id()
        self.vocab_size = max(size, self.end_id + 1)
        end = b"" if self._ends_with_eos else f"end {end_id}".encode()
        self.fingerprint = hashlib.sha256(model + end).hexdigest()
        # If the model puts a space in front of a text, only the first chunk of a text keeps it.
        self._has_prefix = processor.encode("\n", out_type=str)[:1] == [SPACE]
        # The model would read the character U+2581 in text as a space: it is spelled in bytes if the model has bytes.
        self._space_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._spells_space = True
        self._spells_space = self.decode(self.encode(f"a{SPACE}b")) == f"a{SPACE}b"

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, keep: float = 1.0) -> "SentencePieceTokenizer":
        """Train a model of `vocab_size` pieces on lines of the documents; the same input gives the same model.

        Args:
            keep: share of the lines that are read, evenly spread.

        Raises:
            ConfigError: if the text has too few different pieces, or too many characters, for `vocab_size`; names a
                size that works.
        """
        return cls(train_model(documents, vocab_size, keep))

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 (n,), without an end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        chunks = [list(split_text(text, LINE_BORDER)) for text in texts]
        encoded = self._encode_chunks(list(chain.from_iterable(chunks)))
        batch = []
        for chunks_of_text in chunks:
            first, *others = islice(encoded, len(chunks_of_text))
            batch.append(np.concatenate([first, *(ids[self._starts_with_prefix(ids) :] for ids in others)]))
        return batch

    def _starts_with_prefix(self, ids: np.ndarray) -> bool:
        """Whether the first id is the space that the model puts in front of a text; it may also be part of a piece."""
        return self._has_prefix and len(ids) > 0 and self.processor.id_to_piece(int(ids[0])) == SPACE

    def _encode_chunks(self, chunks: list[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(chunks), GROUP):
            group = chunks[start : start + GROUP]
            fragments = [chunk.split(SPACE) if self._spells_space else [chunk] for chunk in group]
            encoded = iter(self.processor.encode(list(chain.from_iterable(fragments))))
            for fragments_of_chunk in fragments:
                joined = list(next(encoded))
                for _ in fragments_of_chunk[1:]:
                    joined += self._space_bytes
                    joined += next(encoded)
                yield np.array(joined, np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; end tokens stand for nothing, bytes that are no UTF-8 for U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return self.processor.decode(ids[ids != self.end_id].tolist())

    def spelled(self, ids: np.ndarray) -> bytes:
        """The bytes of each id's piece, one after another: the text of `ids` with a space that encoding has added."""
        pieces = self._piece_bytes
        return b"".join([pieces[i] for i in ids.tolist()])

    def surface_bytes(self, text: str) -> np.ndarray:
        """UTF-8 bytes of `text` that each id of encode(text) stands for, int64 (n,), as the model's normaliser says.

        The sum is that of the text: characters that the normaliser drops count for the id before or after them.
        """
        sizes: list[int] = []
        dropped = 0  # bytes of fragments without any id, which count for the next one
        for i, chunk in enumerate(split_text(text, LINE_BORDER)):
            ids: list[int] = []
            sizes_of_chunk: list[int] = []
            for j, fragment in enumerate(chunk.split(SPACE) if self._spells_space else [chunk]):
                if j:
                    ids += self._space_bytes
                    sizes_of_chunk += [1] * len(self._space_bytes)
                fragment_ids, fragment_sizes, rest = self._surfaces(fragment)
                ids += fragment_ids
                sizes_of_chunk += fragment_sizes
                dropped += rest
            if i and self._starts_with_prefix(np.array(ids[:1])):
                dropped += sizes_of_chunk.pop(0)
            if sizes_of_chunk:
                sizes_of_chunk[0] += dropped
                dropped = 0
            sizes += sizes_of_chunk
        if sizes:
            sizes[-1] += dropped
        return np.array(sizes, np.int64)

    def _surfaces(self, fragment: str) -> tuple[list[int], list[int], int]:
        """Ids of a text that is encoded at once, the UTF-8 bytes of each, and the bytes of a text without ids."""
        pieces, size = self.processor.encode(fragment, out_type="proto").pieces, len(fragment.encode())
        ends = [*(piece.end for piece in pieces[:-1]), size] if pieces else []  # in bytes
        sizes = np.diff(np.maximum.accumulate(np.array(ends, np.int64)), prepend=0).tolist()
        return [piece.id for piece in pieces], sizes, 0 if pieces else size

    @functools.cached_property
    def _piece_bytes(self) -> list[bytes]:
        """The text of each id in UTF-8; none for control pieces, the unknown piece and an end id above the pieces."""
        processor = self.processor
        texts = [b""] * self.vocab_size
        for i in range(processor.vocab_size()):
            if processor.is_byte(i):
                texts[i] = bytes([int(processor.id_to_piece(i)[3:5], 16)])  # <0x41>
            elif not processor.is_control(i) and not processor.is_unknown(i):
                texts[i] = processor.id_to_piece(i).replace(SPACE, " ").encode()
        return texts

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for, float32 (vocab_size,); 0 for the end token.

        Control pieces and the unknown piece stand for no text either.
        """
        return np.array([len(text) for text in self._piece_bytes], np.float32)

    def save(self, directory: Path) -> list[Path]:
        """Write the files that `load_tokenizer` reads; returns their paths."""
        path = directory / MODEL_FILE
        path.write_bytes(self._model)
        if self._ends_with_eos:
            return [path]
        return [path, _write_settings(directory, vocabulary="sentencepiece", end_id=self.end_id)]


class ByteTokenizer:
    """Bytes of UTF-8: id `offset` + b is byte b, `end_id` ends a document, the other ids stand for no text.

    ByteTokenizer(3, 1, 259) is the layout of ByT5 and of seqio's ByteVocabulary.
    """

    def __init__(self, offset: int = 0, end_id: int = 256, vocab_size: int = 257):
        used = {*range(offset, offset + 256), end_id}
        if len(used) < 257 or min(used) < 0 or max(used) >= vocab_size:
            raise ConfigError(f"bytes at {offset}..{offset + 255} and end_id={end_id} do not fit {vocab_size=}")
        self.offset, self.end_id, self.vocab_size = offset, end_id, vocab_size
        layout = f"flmjax bytes: {offset}..{offset + 255}, end {end_id}"
        if vocab_size > max(used) + 1:
            layout += f", of {vocab_size}"
        self.fingerprint = hashlib.sha256(layout.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 (n,), without an end token."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32) + np.uint32(self.offset)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; end tokens stand for nothing, bytes that are no UTF-8 for U+FFFD."""
        values = np.asarray(ids, np.int64) - self.offset
        values = values[(values >= 0) & (values < 256)]
        return values.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for, float32 (vocab_size,); 0 for the end token."""
        sizes = np.zeros(self.vocab_size, np.float32)
        sizes[self.offset : self.offset + 256] = 1
        return sizes

    def save(self, directory: Path) -> list[Path]:
        """Write the files that `load_tokenizer` reads; returns their paths."""
        layout = {"offset": self.offset, "end_id": self.end_id, "vocab_size": self.vocab_size}
        return [_write_settings(directory, vocabulary="bytes", **layout)]


class Cl100kTokenizer:
    """OpenAI's cl100k_base, whose text ids are 0 to 100255; the spelling of a control token in text is text.

    Text of more than `CHUNK` characters is encoded in chunks. Chunks do not change the ids if every chunk has a
    `CL100K_BORDER`, as in text with line breaks or single spaces.

    Args:
        end_id: by default the id of <|endoftext|>. If the id stands for text, that text is spelled in bytes.

    Raises:
        ConfigError: if the package bpe_openai is missing, or for an `end_id` that is no id of cl100k or stands for a
            single byte.
    """

    def __init__(self, end_id: int = 100257):
        try:
            import bpe_openai  # an optional package, and 1 s
        except ImportError as error:
            raise ConfigError("data.vocabulary='cl100k' needs a package; pip install 'flmjax[data]'") from error
        if not 0 <= end_id < CL100K_IDS:
            raise ConfigError(f"data.end_id={end_id} is no id of cl100k, which has 0..{CL100K_IDS - 1}")
        self._encoding = bpe_openai.get_encoding("cl100k_base")
        texts = self._encoding.token_byte_values()[:CL100K_TEXT_IDS]
        self.end_id = end_id
        self.vocab_size = max(CL100K_TEXT_IDS, end_id + 1)
        self.fingerprint = hashlib.sha256(f"cl100k, end {end_id}: {texts}".encode()).hexdigest()
        self._texts = texts + [b""] * (self.vocab_size - len(texts))
        of_byte = {text[0]: i for i, text in enumerate(texts) if len(text) == 1}
        self._end_bytes = np.array([of_byte[byte] for byte in self._texts[end_id]], np.uint32)
        if end_id in self._end_bytes:
            raise ConfigError(f"data.end_id={end_id} is a single byte in cl100k, which text cannot do without")
        self._texts[end_id] = b""

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 (n,), without an end token."""
        encoded = (self._encoding.encode_ordinary(chunk) for chunk in split_text(text, CL100K_BORDER))
        ids = np.array(list(chain.from_iterable(encoded)), np.uint32)
        is_end = ids == self.end_id
        if is_end.any():
            ids = np.repeat(ids, np.where(is_end, len(self._end_bytes), 1))
            ids[ids == self.end_id] = np.tile(self._end_bytes, is_end.sum())
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; end tokens stand for nothing, bytes that are no UTF-8 for U+FFFD."""
        return b"".join(self._texts[i] for i in ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for, float32 (vocab_size,); 0 for the end token."""
        return np.array([len(text) for text in self._texts], np.float32)

    def save(self, directory: Path) -> list[Path]:
        """Write the files that `load_tokenizer` reads; returns their paths."""
        return [_write_settings(directory, vocabulary="cl100k", end_id=self.end_id)]


Tokenizer = SentencePieceTokenizer | ByteTokenizer | Cl100kTokenizer


def named_tokenizer(vocabulary: str, end_id: int | None) -> Tokenizer | None:
    """The tokenizer of `data.vocabulary` and `data.end_id`; None for "sentencepiece", which must be trained.

    Raises:
        ConfigError: for an unknown vocabulary, an end id that the vocabulary cannot have, and a model file that cannot
            be read.
    """
    if vocabulary == "sentencepiece":
        if end_id is not None:
            raise ConfigError(f"data.end_id={end_id} is not read: a trained vocabulary has an end token already")
        return None
    if vocabulary == "bytes":
        if end_id not in (None, 256):
            raise ConfigError(f"data.end_id={end_id} cannot end a document of data.vocabulary='bytes'; its end is 256")
        return ByteTokenizer()
    if vocabulary == "cl100k":
        return Cl100kTokenizer() if end_id is None else Cl100kTokenizer(end_id)
    if vocabulary.endswith(".model"):
        return _read_model(Path(vocabulary), end_id)
    raise ConfigError(f"data.vocabulary='{vocabulary}' is none of sentencepiece, bytes, cl100k or a path to a .model")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `directory`.

    Raises:
        ConfigError: if its files are missing or cannot be read.
    """
    model, path = directory / MODEL_FILE, directory / SETTINGS_FILE
    if not path.is_file():
        if not model.is_file():
            raise ConfigError(f"{directory} holds no tokenizer ({MODEL_FILE} or {SETTINGS_FILE})")
        return _read_model(model)
    kinds: dict[str, Callable[..., Tokenizer]] = {
        "sentencepiece": functools.partial(_read_model, model),
        "bytes": ByteTokenizer,
        "cl100k": Cl100kTokenizer,
    }
    try:
        settings = json.loads(path.read_bytes())
        return kinds[settings.pop("vocabulary")](**settings)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no tokenizer's: {error!r}") from error


def _read_model(path: Path, end_id: int | None = None) -> SentencePieceTokenizer:
    try:
        return SentencePieceTokenizer(path.read_bytes(), end_id)
    except OSError as error:
        raise ConfigError(f"{path.absolute()} cannot be read: {error.strerror}") from error
    except RuntimeError as error:
        raise ConfigError(f"{path.absolute()} is no SentencePiece model: {error}") from error


def _write_settings(directory: Path, **settings: Any) -> Path:
    path = directory / SETTINGS_FILE
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def split_text(text: str, border: re.Pattern[str]) -> Iterator[str]:
    """The text in chunks of at most `CHUNK` characters, which end at the last `border` or, without one, anywhere."""
    start = 0
    while len(text) - start > CHUNK:
        match = border.match(text, start, start + CHUNK)
        end = match.end() if match else start + CHUNK
        yield text[start:end]
        start = end
    yield text[start:]
