"""Bytes of text that tokens stand for: their sum is the text's size, whatever a vocabulary does to text."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizers import LIKE_LLAMA, TRICKY, train_foreign

from flmjax.config import DataConfig
from flmjax.data import tokenizers
from flmjax.data.inspection import summary
from flmjax.data.loader import TrainingStream
from flmjax.data.mixture import MixturePhase
from flmjax.data.prepare import prepare
from flmjax.data.prepared import data_warnings, load
from flmjax.data.round_trip import round_trip
from flmjax.data.tokenizers import SentencePieceTokenizer

MODELS = {
    "llama": LIKE_LLAMA,
    "nmt_nfkc": {},  # and single spaces, a space in front, unknown characters
    "unigram": {"model_type": "unigram", "vocab_size": 60},
    "nmt_nfkc with bytes": {"vocab_size": 350, "byte_fallback": True},
    "identity without a space in front": {**LIKE_LLAMA, "add_dummy_prefix": False},
    "a space behind": {**LIKE_LLAMA, "treat_whitespace_as_suffix": True},
    "folded case": {"vocab_size": 350, "byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf"},
}
SHORT_LINES = [f"line {i}: the cat sat on mat {i * 37 % 1000}" for i in range(500)]


@pytest.fixture(scope="module", params=MODELS)
def foreign(request) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_foreign(**MODELS[request.param]))


def bytes_of_tokens(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    return int(tokenizer.token_bytes[ids].sum() + round_trip(tokenizer, text, ids).corrections[:, 1].sum())


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example(text=TRICKY[2])
@example(text=TRICKY[3])
@example(text=TRICKY[4])
@example(text="ｆｕｌｌ width … ﬁ ㍿ é e\u0301 \u3000the cat")
@settings(max_examples=200, deadline=None)
def test_bytes_of_tokens_are_those_of_any_text(foreign, text):
    """openai/parameter-golf#897: a space that the vocabulary adds counted as a byte of text."""
    ids = foreign.encode(text)
    assert bytes_of_tokens(foreign, text) == (len(text.encode()) if len(ids) else 0)
    assert round_trip(foreign, text, ids).is_exact == (foreign.decode(ids) == text)


def test_bytes_of_a_text_in_chunks_are_those_of_the_text(foreign, monkeypatch):
    text = "the ｃａｔ \u2581 sat\n\n on  a mat  " * 40
    monkeypatch.setattr(tokenizers, "CHUNK", 50)
    assert bytes_of_tokens(foreign, text) == len(text.encode())


def test_a_space_in_front_of_a_line_is_no_byte_of_it():
    tokenizer = SentencePieceTokenizer(train_foreign(**LIKE_LLAMA))
    sizes = [len(line) for line in SHORT_LINES]
    assert [bytes_of_tokens(tokenizer, line) for line in SHORT_LINES] == sizes
    ids = tokenizer.encode(SHORT_LINES[0])
    assert tokenizer.token_bytes[ids].sum() == sizes[0] + 1
    assert round_trip(tokenizer, SHORT_LINES[0], ids).corrections.tolist() == [[0, -1]]
    assert round_trip(tokenizer, SHORT_LINES[0], ids).is_exact


def make_stream(folder, model: bytes, texts, length=16, **fields) -> TrainingStream:
    path = folder / "given.model"
    path.write_bytes(model)
    data = DataConfig(sources=("lines",), vocabulary=str(path), validation_fraction=0.3, **fields)
    prepared = prepare(data, folder / "data", sources={"lines": texts})
    return TrainingStream(prepared, data, 0, length, (MixturePhase((1.0,), None),))


@pytest.mark.parametrize("options", [LIKE_LLAMA, {}], ids=["llama", "nmt_nfkc"])
def test_bits_per_byte_divide_by_the_bytes_of_the_text(options, tmp_path):
    """The bytes of all validation sequences are those of the held-out text, except of the first token of the stream."""
    stream = make_stream(tmp_path, train_foreign(**options), [f"{line} …" for line in SHORT_LINES])
    prepared = stream.prepared
    text_bytes = prepared.meta["sources"]["lines"]["validation"]["bytes"]
    first = prepared.tokens("lines", "validation")[0]
    of_first = prepared.tokenizer.token_bytes[first] - 1  # without the space in front
    batch = stream.validation_rows(10_000)
    assert batch["bytes"].sum() == text_bytes - of_first
    assert prepared.tokenizer.token_bytes[batch["targets"]].sum() != batch["bytes"].sum()


def test_documents_apart_count_the_bytes_of_their_targets(tmp_path):
    """The first token of a document is no target where documents are kept apart, and its correction does not count."""
    stream = make_stream(tmp_path, train_foreign(**LIKE_LLAMA), SHORT_LINES, 64, document_attention=True)
    batch, sizes = stream.validation_rows(10_000), stream.prepared.tokenizer.token_bytes
    assert batch["bytes"].tolist() == (sizes[batch["targets"]] * batch["weights"]).sum(axis=1).tolist()


def test_training_sequences_have_the_bytes_of_an_epoch(tmp_path):
    stream = make_stream(tmp_path, train_foreign(**LIKE_LLAMA), SHORT_LINES)
    rows = math.ceil((stream.prepared.num_tokens("lines", "train") - 1) / 16)
    text_bytes = stream.prepared.meta["sources"]["lines"]["train"]["bytes"]
    first = stream.prepared.tokenizer.token_bytes[stream.prepared.tokens("lines", "train")[0]] - 1
    assert sum(float(stream.samples[n]["bytes"]) for n in range(rows)) == text_bytes - first


def test_texts_that_do_not_come_back_are_counted_and_said(tmp_path):
    texts = [*SHORT_LINES, *(f"ｗｉｄｅ {i}" for i in range(20)), *(f"two  spaces {i}" for i in range(10))]
    stream = make_stream(tmp_path, train_foreign(**MODELS["nmt_nfkc with bytes"]), texts)
    counts = stream.prepared.meta["sources"]
    assert counts["lines"]["changed"] == 30
    (line,) = data_warnings(counts, 16)
    assert "the tokens of 30 of 530 documents do not decode to the same text" in line
    assert line in summary(stream)


def test_a_vocabulary_that_keeps_text_has_no_file_of_corrections(tmp_path):
    data = DataConfig(sources=("a",), vocab_size=300, validation_fraction=0.3)
    prepared = prepare(data, tmp_path / "data", sources={"a": SHORT_LINES})
    assert prepared.meta["sources"]["a"]["changed"] == 0
    assert not [name for name in prepared.meta["files"] if name.endswith(".bytes.i64")]
    assert prepared.byte_corrections("a", "train").shape == (0, 2)


def test_corrections_are_sealed_with_the_other_files(tmp_path):
    stream = make_stream(tmp_path, train_foreign(**LIKE_LLAMA), SHORT_LINES)
    corrections = stream.prepared.byte_corrections("lines", "train")
    np.testing.assert_array_equal(corrections[:, 0], stream.prepared.offsets("lines", "train")[:-1])
    assert (corrections[:, 1] == -1).all()
    assert (load(stream.prepared.directory).byte_corrections("lines", "train") == corrections).all()
