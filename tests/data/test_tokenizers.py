"""Tokenizers: lossless on any text, deterministic, honest about bytes."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flmjax.config import ConfigError
from flmjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, load_tokenizer

TEXT = "the cat sat on a mat while small models grow larger and larger 模型 从 小 到 大 生长 。 , . 1984 23"
WORDS = TEXT.split()
CORPUS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60)) + f"\n    indented {i}\n" for i in range(1, 60)]
TRICKY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\n\ttab\r\n\x00\x07\x1b",
    "\u2581 and \u2581\u2581",  # how SentencePiece writes a space
    "\u2585",  # reserved by its trainer
    "</s><unk><s><|endoftext|><eod><0x41>",
    "😀👩‍👩‍👧 é e\u0301 \ufeff\u00a0\u3000 \U0010ffff",
]


@pytest.fixture(scope="module")
def pieces() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(CORPUS, 400)


@pytest.fixture(params=["pieces", "bytes"])
def tokenizer(request, pieces):
    return pieces if request.param == "pieces" else ByteTokenizer()


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text=TRICKY[4])
@settings(max_examples=300, deadline=None)
def test_any_text_survives_and_its_bytes_are_counted_exactly(pieces, text):
    for tokenizer in (pieces, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.end_id not in ids


def test_tricky_texts_survive_alone_and_in_a_batch(tokenizer):
    for text, ids in zip(TRICKY, tokenizer.encode_batch(TRICKY), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.uint32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_end_token_stands_for_no_text(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.end_id, *tokenizer.encode(" b")]
    assert tokenizer.decode(ids) == "a b"
    assert tokenizer.token_bytes[tokenizer.end_id] == 0
    assert tokenizer.token_bytes.dtype == np.float32
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


def test_pieces_are_longer_than_bytes_and_digits_stay_single(pieces):
    assert pieces.vocab_size == 400
    assert len(pieces.encode("larger and larger")) < 10
    assert len(pieces.encode("1984")) == 4


def test_training_twice_gives_the_same_model_and_other_text_another(pieces):
    assert SentencePieceTokenizer.train(CORPUS, 400).fingerprint == pieces.fingerprint
    assert SentencePieceTokenizer.train(CORPUS[:30], 400).fingerprint != pieces.fingerprint


def test_keep_trains_on_a_part_spread_evenly(pieces):
    half = [line for i, text in enumerate(CORPUS) for line in text.split("\n")[:1] if i % 2]
    lines = [text.split("\n")[0] for text in CORPUS]  # one line a document; every second one is kept
    assert (
        SentencePieceTokenizer.train(lines, 320, keep=0.5).fingerprint
        == SentencePieceTokenizer.train(half, 320).fingerprint
    )


def test_a_vocabulary_too_large_for_the_text_names_the_largest_that_works():
    with pytest.raises(ConfigError, match=r"data\.vocab_size=4000 .*at most (\d+) pieces") as error:
        SentencePieceTokenizer.train(CORPUS, 4000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert SentencePieceTokenizer.train(CORPUS, largest).vocab_size == largest


def test_a_vocabulary_too_small_for_the_characters_names_what_they_need():
    text = ["".join(chr(0x4E00 + i) for i in range(200))] * 3
    with pytest.raises(ConfigError, match=r"data\.vocab_size=300 is too small: .* need 458"):  # 258 + 200
        SentencePieceTokenizer.train(text, 300)


def test_no_text_is_one_line():
    with pytest.raises(ConfigError, match="no text to train"):
        SentencePieceTokenizer.train([], 300)


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))


def test_a_folder_without_tokenizer_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match=r"tokenizer\.model is no SentencePiece model"):
        load_tokenizer(tmp_path)
