"""Text to ids and back without loss: a SentencePiece BPE trained on the corpus, or plain bytes.

Both tokenizers have the same members; `end_id` ends a document and is never produced by text, whatever it spells.
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from flmjax.config import ConfigError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
MODEL_FILE = "tokenizer.model"
BYTES_FILE = "tokenizer.json"
_UNKNOWN_ID, _END_ID = 0, 1


class SentencePieceTokenizer:
    """BPE with byte fallback and no normalisation: decode(encode(text)) == text for every str that UTF-8 can hold.

    `model` is a serialised SentencePiece model as trained by `train`.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # In text the character U+2581 would be read as a space, so it is spelled in bytes.
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.end_id = _END_ID
        self.vocab_size = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, keep: float = 1.0) -> "SentencePieceTokenizer":
        """Train on the share `keep` of the documents' lines, evenly spread; the same input gives the same model.

        Raises:
            ConfigError: when the text has too few or too many different parts for `vocab_size`; names a size that does.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(documents, keep),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9995,  # the rarest characters are left to the bytes
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                unk_id=_UNKNOWN_ID,
                eos_id=_END_ID,
                bos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise ConfigError(_explain(str(error), vocab_size)) from error
        return cls(model.getvalue())

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 (n,), without an end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        parts = [text.split(SPACE) for text in texts]
        encoded = iter(self._processor.encode([part for split in parts for part in split]))
        ids = []
        for split in parts:
            joined = list(next(encoded))
            for _ in split[1:]:
                joined += self._space_bytes
                joined += next(encoded)
            ids.append(np.array(joined, np.uint32))
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; end tokens stand for nothing, bytes that are no UTF-8 for U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for, float32 (vocab_size,); 0 for the end token."""
        processor = self._processor
        sizes = np.zeros(self.vocab_size, np.float32)
        for i in range(self.vocab_size):
            if processor.is_byte(i):
                sizes[i] = 1
            elif not processor.is_control(i) and not processor.is_unknown(i):
                sizes[i] = len(processor.id_to_piece(i).replace(SPACE, " ").encode())
        return sizes

    def save(self, directory: Path) -> Path:
        """Write the model; returns its path, which `load_tokenizer(directory)` finds."""
        path = directory / MODEL_FILE
        path.write_bytes(self._model)
        return path


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = 257
    end_id = 256
    fingerprint = hashlib.sha256(b"flmjax bytes: 0..255, end 256").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 (n,), without an end token."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; end tokens stand for nothing, bytes that are no UTF-8 for U+FFFD."""
        return bytes(int(i) for i in ids if i != self.end_id).decode("utf-8", errors="replace")

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for, float32 (vocab_size,); 0 for the end token."""
        sizes = np.ones(self.vocab_size, np.float32)
        sizes[self.end_id] = 0
        return sizes

    def save(self, directory: Path) -> Path:
        """Write a note that says "bytes"; returns its path, which `load_tokenizer(directory)` finds."""
        path = directory / BYTES_FILE
        path.write_text(json.dumps({"vocabulary": "bytes"}))
        return path


Tokenizer = SentencePieceTokenizer | ByteTokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that was saved into `directory`.

    Raises:
        ConfigError: when there is none, or its file cannot be read as one.
    """
    if (directory / MODEL_FILE).is_file():
        try:
            return SentencePieceTokenizer((directory / MODEL_FILE).read_bytes())
        except RuntimeError as error:
            raise ConfigError(f"{directory / MODEL_FILE} is no SentencePiece model: {error}") from error
    if (directory / BYTES_FILE).is_file():
        return ByteTokenizer()
    raise ConfigError(f"{directory} holds no tokenizer ({MODEL_FILE} or {BYTES_FILE})")


def _training_lines(documents: Iterable[str], keep: float) -> Iterator[str]:
    """Lines of at most 1000 characters (SentencePiece skips those above 4192 bytes).

    The line break stands at the front of the line after it, since the trainer cuts it off at the end.
    """
    index = 0
    for document in documents:
        for line in re.findall(r"\n*[^\n]{1,1000}", document):
            index += 1
            if int(index * keep) > int((index - 1) * keep):
                yield line


def _explain(error: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", error):
        return (
            f"data.vocab_size={vocab_size} is too large for this little text: at most {found[1]} pieces can be formed; "
            f"lower it, add text, or set data.vocabulary='bytes'"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"data.vocab_size={vocab_size} is too small: the characters of this text alone need {found[1]}; raise it"
    if "sentences_.empty()" in error:
        return "there is no text to train a vocabulary on"
    return f"SentencePiece cannot train on this text: {error}"
