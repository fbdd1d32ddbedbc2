"""Text to ids and back: whether a text survives, and the UTF-8 bytes of it that each token stands for.

Bits per byte are the nats of the targets / ln 2 / the bytes of text that they stand for. `token_bytes` of a tokenizer
has the bytes of each id. Their sum over a text's tokens is the text's size for bytes, for cl100k and for a
SentencePiece model that takes text as it is. Another SentencePiece model adds a space in front of a text, replaces
characters (NFKC), drops spaces, or has no piece for a character; corrections, token by token, make the sum right for
every text:

    text             "ab"            model with a space in front
    pieces           " a"    "b"
    token_bytes      2       1
    corrections      -1      0       of bits per byte, " a" counts 1 byte
"""

from typing import NamedTuple

import numpy as np

from flmjax.data.tokenizers import SentencePieceTokenizer, Tokenizer

NO_CORRECTIONS = np.zeros((0, 2), np.int64)


class RoundTrip(NamedTuple):
    """A text against its tokens.

    Attributes:
        corrections: for each token whose text has not token_bytes of its id: (its index, the difference), int64 (n, 2).
        is_exact: whether decode(ids) is the text.
    """

    corrections: np.ndarray
    is_exact: bool


def round_trip(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> RoundTrip:
    """Compare a text with its ids, the result of tokenizer.encode(text)."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return RoundTrip(NO_CORRECTIONS, True)
    text_bytes, spelled = text.encode(), tokenizer.spelled(ids)
    if spelled == text_bytes and text == text.strip(" "):  # decoding may remove a space at either end, nothing else
        return RoundTrip(NO_CORRECTIONS, True)
    is_exact = tokenizer.decode(ids) == text
    if spelled == text_bytes:
        return RoundTrip(NO_CORRECTIONS, is_exact)
    if spelled == b" " + text_bytes:
        return RoundTrip(np.array([[0, -1]]), is_exact)
    differences = tokenizer.surface_bytes(text) - tokenizer.token_bytes[ids].astype(np.int64)
    places = np.flatnonzero(differences)
    return RoundTrip(np.stack([places, differences[places]], axis=1), is_exact)
