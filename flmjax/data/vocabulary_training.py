"""Training of a SentencePiece model on text, none of which is lost."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from flmjax.config import ConfigError
from flmjax.config.values import MIN_VOCAB_SIZE

UNKNOWN_ID, END_ID = 0, 1
RESERVED = "\u2585"  # how SentencePiece's trainer marks a rare character


def train_model(documents: Iterable[str], vocab_size: int, keep: float = 1.0) -> bytes:
    """The serialised model of SentencePieceTokenizer.train; see there."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(documents, keep),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # the rarest characters are spelled in bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=UNKNOWN_ID,
            eos_id=END_ID,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise ConfigError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def training_lines(documents: Iterable[str], keep: float = 1.0) -> Iterator[str]:
    """A share `keep` of the lines, cut so that SentencePiece's trainer skips none of them.

    It skips lines above 4192 bytes: a line has at most 1000 characters and 100 line breaks in front. It skips
    lines with U+2585, its sign for a rare character: such a line is divided there, and U+2585 is spelled in bytes. It
    removes line breaks at the end of a line: they stand in front of the next line.
    """
    index = 0
    for document in documents:
        for line in re.findall(rf"\n{{0,100}}[^\n{RESERVED}]{{1,1000}}", document):
            index += 1
            if int(index * keep) > int((index - 1) * keep):
                yield line


def _explain(error: str, vocab_size: int) -> str:
    """An error of SentencePiece's trainer in terms of the settings."""
    if match := re.search(r"value <= (\d+)", error):
        cures = "lower it, add text," if int(match[1]) >= MIN_VOCAB_SIZE else "add text"
        return (
            f"data.vocab_size={vocab_size} is too large for this little text: at most {match[1]} pieces can be formed; "
            f"{cures} or set data.vocabulary='bytes'"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"data.vocab_size={vocab_size} is too small: the characters of this text alone need {match[1]}; raise it"
    if "sentences_.empty()" in error:
        return "there is no text to train a vocabulary on"
    return f"SentencePiece cannot train on this text: {error}"
