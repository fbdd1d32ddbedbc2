"""Tokenizers: lossless on any text, deterministic, honest about bytes."""

import io
import json
import resource
import sys
import time

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flmjax.config import ConfigError
from flmjax.data import tokenizers
from flmjax.data.tokenizers import (
    ByteTokenizer,
    Cl100kTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    named_tokenizer,
)

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
    "a\n\n\nb",  # cl100k's id 1432 between two letters
    "😀👩‍👩‍👧 é e\u0301 \ufeff\u00a0\u3000 \U0010ffff",
]


@pytest.fixture(scope="module")
def pieces() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def cl100k() -> Cl100kTokenizer:
    pytest.importorskip("bpe_openai")
    return Cl100kTokenizer()


@pytest.fixture(scope="module", params=["pieces", "bytes", "bytes from 3", "cl100k", "cl100k that ends with 1432"])
def tokenizer(request, pieces):
    if request.param.startswith("cl100k"):
        pytest.importorskip("bpe_openai")
    return {
        "pieces": lambda: pieces,
        "bytes": ByteTokenizer,
        "bytes from 3": lambda: ByteTokenizer(3, 1, 259),
        "cl100k": Cl100kTokenizer,
        "cl100k that ends with 1432": lambda: Cl100kTokenizer(1432),
    }[request.param]()


def train_foreign(**options) -> bytes:
    """A model as others train them: NFKC, a space in front, single spaces, and what it has not seen is unknown."""
    model = io.BytesIO()
    lines = [line for text in CORPUS for line in text.split("\n") if line]
    options = {"vocab_size": 90, "model_type": "bpe", "minloglevel": 3, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


LIKE_LLAMA = {
    "vocab_size": 350,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text=TRICKY[4])
@example(text=TRICKY[7])
@settings(max_examples=300, deadline=None)
def test_any_text_survives_and_its_bytes_are_counted_exactly(tokenizer, text):
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


def test_control_tokens_spelled_in_text_are_text(tokenizer):
    text = "<|endoftext|> a<|fim_prefix|><|fim_middle|><|fim_suffix|><|endofprompt|></s><pad>"
    ids = tokenizer.encode(text)
    assert ids.max() <= 100255
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == text


def test_cl100k_has_the_published_ids(cl100k):
    assert cl100k.encode("hello world").tolist() == [15339, 1917]
    assert cl100k.encode("a\n\n\nb").tolist() == [64, 1432, 65]
    assert (cl100k.end_id, cl100k.vocab_size) == (100257, 100258)


def test_an_end_id_that_stands_for_text_is_spelled_in_bytes(cl100k):
    ends_with_lines = Cl100kTokenizer(1432)
    assert ends_with_lines.encode("a\n\n\nb\n\n\nc").tolist() == [64, 198, 198, 198, 65, 198, 198, 198, 66]
    assert ends_with_lines.vocab_size == 100256
    assert ends_with_lines.fingerprint != cl100k.fingerprint


def test_ids_of_cl100k_that_no_text_has_stand_for_nothing():
    pytest.importorskip("bpe_openai")
    last = Cl100kTokenizer(100276)
    assert last.vocab_size == 100277
    assert last.decode([64, 100256, 100257, 100276, 65]) == "ab"
    assert last.token_bytes[100256:].sum() == 0


def test_bytes_from_3_are_byt5s():
    byt5 = ByteTokenizer(3, 1, 259)
    assert byt5.encode("a\x00\u00ff").tolist() == [97 + 3, 0 + 3, 0xC3 + 3, 0xBF + 3]
    assert byt5.decode([0, 1, 2, 100, 259, 383]) == "a"
    assert np.flatnonzero(byt5.token_bytes == 0).tolist() == [0, 1, 2]
    assert byt5.fingerprint != ByteTokenizer(3, 1, 384).fingerprint
    assert ByteTokenizer().fingerprint == "7d149010404c4bcf7cfa311fbd4d2383dd54763a213d96ddf6002ada2b4f6739"


def test_bytes_that_meet_the_end_or_leave_the_vocabulary_are_refused():
    for layout in [(0, 255, 257), (3, 1, 258), (0, 256, 256), (-1, 256, 257), (3, -1, 259)]:
        with pytest.raises(ConfigError, match="do not fit"):
            ByteTokenizer(*layout)


BORDERS = st.text(
    " \t\n\r\x0b\x1c\x85\u2028\u3000aZ\u00e9sl'-_.!1\u00b2\u2167\u6a21\U0001f600\u0301\u2581", max_size=30
)


@given(text=BORDERS)
@settings(max_examples=500, deadline=None)
def test_ids_do_not_change_where_a_border_cuts(cl100k, pieces, text):
    for tokenizer, border in [(cl100k, tokenizers.CL100K_BORDER), (pieces, tokenizers.LINE_BORDER)]:
        expected = tokenizer.encode(text).tolist()
        for limit in range(1, len(text)):
            if match := border.match(text, 0, limit):
                parts = tokenizer.encode_batch([text[: match.end()], text[match.end() :]])
                assert np.concatenate(parts).tolist() == expected


def test_a_long_text_has_the_ids_of_the_whole(tokenizer, monkeypatch):
    text = "\n\n".join(CORPUS)  # lines of 100 to 350 characters
    expected = tokenizer.encode(text)
    monkeypatch.setattr(tokenizers, "CHUNK", 1000)
    np.testing.assert_array_equal(tokenizer.encode(text), expected)
    chunks = list(tokenizers.split_text(text, tokenizers.LINE_BORDER))
    assert "".join(chunks) == text
    assert len(text) / 1000 < len(chunks) < len(text) / 500
    assert max(map(len, chunks)) <= 1000


def test_a_long_text_without_any_border_survives(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizers, "CHUNK", 10)
    text = "模型从小到大\u2581😀生长" * 20 + "\u2581"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_four_bytes_a_character_are_not_too_many_ids(cl100k):
    text = "\U000e0fff" * (tokenizers.CHUNK + 1)
    assert cl100k.decode(cl100k.encode(text)) == text


def test_a_document_of_50_mb_takes_seconds_and_little_memory(cl100k):
    text = "\n".join(CORPUS)
    text *= 50_000_000 // len(text.encode()) + 1
    before, start = _peak_bytes(), time.monotonic()
    ids = cl100k.encode(text)
    assert time.monotonic() - start < 60  # 5 s on a free core
    assert _peak_bytes() - before < 1e9
    assert cl100k.token_bytes[ids].sum(dtype=np.float64) == len(text.encode())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_sentencepiece_gets_a_long_text_in_groups_of_chunks(pieces, monkeypatch):
    text = "\n\n".join(CORPUS)
    expected = pieces.encode(text)
    calls = []

    class Processor:
        def encode(self, parts, real=pieces.processor):
            calls.append(parts)
            return real.encode(parts)

    monkeypatch.setattr(tokenizers, "CHUNK", 1000)
    monkeypatch.setattr(tokenizers, "GROUP", 3)
    monkeypatch.setattr(pieces, "processor", Processor())
    np.testing.assert_array_equal(pieces.encode(text), expected)
    assert max(len(part) for parts in calls for part in parts) <= 1000
    assert {len(parts) for parts in calls[:-1]} == {3}


def test_a_model_with_an_unknown_piece_loses_unseen_characters():
    tokenizer = SentencePieceTokenizer(train_foreign())
    assert tokenizer.end_id == 2  # the trainer's default
    ids = tokenizer.encode("the \u2581 cat\nsat \U0001f600")
    assert tokenizer.decode(ids) == "the cat sat  \u2047 "  # SentencePiece's sign for it, in spaces
    assert ids[-1] == 0
    assert tokenizer.token_bytes[0] == 0
    assert tokenizer.decode([*ids[:1], 2, *ids[1:]]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "options", [{}, {"model_type": "unigram", "vocab_size": 60}, LIKE_LLAMA], ids=["bpe", "unigram", "llama"]
)
def test_a_model_file_encodes_long_text_as_without_chunks(options, monkeypatch):
    model = train_foreign(**options)
    tokenizer = SentencePieceTokenizer(model)
    text = "\n\n".join(CORPUS)
    expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    monkeypatch.setattr(tokenizers, "CHUNK", 1000)
    assert tokenizer.encode(text).tolist() == expected


def test_a_space_sign_is_spelled_in_bytes_if_that_adds_no_space():
    assert SentencePieceTokenizer(train_foreign(**LIKE_LLAMA)).encode("a\u2581b").tolist() == (
        SentencePieceTokenizer(train_foreign(**LIKE_LLAMA)).encode("a b").tolist()
    )
    tokenizer = SentencePieceTokenizer(train_foreign(**LIKE_LLAMA, add_dummy_prefix=False))
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a\u2581b"


def test_a_model_without_an_end_takes_that_of_the_settings():
    model = train_foreign(eos_id=-1, pad_id=3)
    with pytest.raises(ConfigError, match=r"no end-of-sentence piece; set data\.end_id"):
        SentencePieceTokenizer(model)
    padded, further = SentencePieceTokenizer(model, 3), SentencePieceTokenizer(model, 90)
    assert (padded.vocab_size, further.vocab_size) == (90, 91)
    assert padded.fingerprint != further.fingerprint
    for tokenizer in (padded, further):
        ids = tokenizer.encode("the cat")
        assert tokenizer.decode([*ids, tokenizer.end_id]) == "the cat"
        assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
        assert tokenizer.token_bytes[tokenizer.end_id] == 0
    for end_id in (0, 20, 91, -2):
        with pytest.raises(ConfigError, match=rf"data\.end_id={end_id} is no control piece .* or 90, the first free"):
            SentencePieceTokenizer(model, end_id)


def test_an_end_id_that_cl100k_cannot_have_is_named():
    pytest.importorskip("bpe_openai")
    for end_id in (-1, 100277):
        with pytest.raises(ConfigError, match=rf"data\.end_id={end_id} is no id of cl100k, which has 0\.\.100276"):
            Cl100kTokenizer(end_id)
    with pytest.raises(ConfigError, match=r"data\.end_id=198 is a single byte"):  # the line break
        Cl100kTokenizer(198)


def test_cl100k_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    with pytest.raises(ConfigError, match=r"data\.vocabulary='cl100k' needs a package; pip install 'flmjax\[data\]'"):
        named_tokenizer("cl100k", None)


def test_settings_name_a_tokenizer(cl100k, tmp_path):
    assert named_tokenizer("bytes", None).fingerprint == named_tokenizer("bytes", 256).fingerprint
    assert named_tokenizer("cl100k", None).fingerprint == cl100k.fingerprint
    assert named_tokenizer("cl100k", 1432).end_id == 1432
    assert named_tokenizer("sentencepiece", None) is None
    (tmp_path / "t5.model").write_bytes(train_foreign(pad_id=3))
    assert named_tokenizer(str(tmp_path / "t5.model"), None).end_id == 2
    assert named_tokenizer(str(tmp_path / "t5.model"), 3).end_id == 3


def test_settings_that_name_no_tokenizer_are_one_line(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"garbage")
    (tmp_path / "empty.model").write_bytes(b"")
    for vocabulary, end_id, message in [
        ("bytes", 1, r"data\.end_id=1 .*'bytes'.* 256$"),
        ("sentencepiece", 1, r"data\.end_id=1 is not read: a trained vocabulary has an end token already$"),
        ("words", None, r"data\.vocabulary='words' is none of"),
        (f"{tmp_path}/missing.model", None, r"missing\.model cannot be read: No such file"),
        (f"{tmp_path}/broken.model", None, r"broken\.model is no SentencePiece model"),
        (f"{tmp_path}/empty.model", None, r"empty\.model is no SentencePiece model"),
    ]:
        with pytest.raises(ConfigError, match=message):
            named_tokenizer(vocabulary, end_id)


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    files = tokenizer.save(tmp_path)
    assert files == sorted(tmp_path.iterdir())
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.end_id, loaded.vocab_size) == (tokenizer.end_id, tokenizer.vocab_size)
    np.testing.assert_array_equal(loaded.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))


def test_an_end_id_of_the_settings_is_saved_beside_the_model(tmp_path):
    tokenizer = SentencePieceTokenizer(train_foreign(), 1)
    assert sorted(path.name for path in tokenizer.save(tmp_path)) == ["tokenizer.json", "tokenizer.model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer.model"]
    loaded = load_tokenizer(tmp_path)
    assert loaded.end_id == 1
    assert loaded.fingerprint == tokenizer.fingerprint != SentencePieceTokenizer(train_foreign()).fingerprint


def test_a_folder_without_tokenizer_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match=r"tokenizer\.model is no SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_broken_settings_file_is_named(tmp_path):
    good = {"vocabulary": "bytes", "offset": 0, "end_id": 256, "vocab_size": 257}
    (tmp_path / "tokenizer.json").write_text(json.dumps(good))
    assert load_tokenizer(tmp_path).fingerprint == ByteTokenizer().fingerprint
    for content in [
        "",
        "[]",
        '"bytes"',
        "{}",
        json.dumps(good)[:-1],
        json.dumps(good | {"vocabulary": "words"}),
        json.dumps(good | {"end_id": "256"}),
        json.dumps(good | {"more": 1}),
        "\udc80",
    ]:
        (tmp_path / "tokenizer.json").write_text(content, errors="surrogateescape")
        with pytest.raises(ConfigError, match=r"tokenizer\.json is no tokenizer's"):
            load_tokenizer(tmp_path)


def test_a_hard_cut_of_a_model_with_a_prefix_loses_no_text(monkeypatch):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["this is a text of words", "and a text of more words"] * 50), model_writer=model,
        model_type="bpe", vocab_size=300, byte_fallback=True, normalization_rule_name="identity", minloglevel=3,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(model.getvalue())
    text = "this is a text of words and a text " * 3
    for chunk in range(5, 40):
        monkeypatch.setattr("flmjax.data.tokenizers.CHUNK", chunk)
        decoded = tokenizer.decode(tokenizer.encode(text))
        assert decoded.replace(" ", "") == text.replace(" ", "")
