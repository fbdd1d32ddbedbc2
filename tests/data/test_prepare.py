"""Prepared directories: complete or absent, verified, split by document, one setting each."""

import dataclasses
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from flmjax.config import ConfigError, DataConfig, RunConfig, StageConfig
from flmjax.data import prepare as module
from flmjax.data.held_out import mixtures_of
from flmjax.data.prepare import has_same_preparation, prepare
from flmjax.data.prepared import data_warnings, load
from flmjax.data.sources.documents import Document

BYTES = DataConfig(sources=("a", "b"), vocabulary="bytes", validation_fraction=0.2)
DOCUMENTS = {
    "a": [f"document {i} of a,\n\tnumber {i * i} 文档" for i in range(60)],
    "b": [f"b has {i}" for i in range(40)]
    + [f"document {i} of a,\n\tnumber {i * i} 文档" for i in range(0, 60, 7)] * 2,
}


@pytest.fixture
def prepared(tmp_path):
    return prepare(BYTES, tmp_path / "data", sources=DOCUMENTS)


def documents_of(prepared, source, split):
    tokens, offsets = prepared.tokens(source, split), prepared.offsets(source, split)
    return [prepared.tokenizer.decode(tokens[int(a) : int(b)]) for a, b in itertools.pairwise(offsets)]


def test_every_document_is_whole_on_exactly_one_side_in_order(prepared):
    for source, texts in DOCUMENTS.items():
        sides = {split: documents_of(prepared, source, split) for split in ("train", "validation")}
        assert set(sides["train"]).isdisjoint(sides["validation"])
        for side in sides.values():
            assert side == [text for text in texts if text in set(side)]
        assert sorted(sides["train"] + sides["validation"]) == sorted(texts)


def test_equal_documents_are_on_one_side_across_sources(prepared):
    train = {text for s in "ab" for text in documents_of(prepared, s, "train")}
    validation = {text for s in "ab" for text in documents_of(prepared, s, "validation")}
    assert train.isdisjoint(validation)
    assert any(text in documents_of(prepared, "b", "validation") for text in documents_of(prepared, "a", "validation"))


def test_held_out_share_is_near_the_fraction(tmp_path):
    data = DataConfig(sources=("x",), vocabulary="bytes", validation_fraction=0.05)
    done = prepare(data, tmp_path / "data", sources={"x": (f"number {i}" for i in range(5000))})
    assert 200 < done.meta["sources"]["x"]["validation"]["documents"] < 300  # 250 +- 3.2 sigma


def test_end_token_closes_each_document_or_none(prepared, tmp_path):
    for source in "ab":
        ends = prepared.offsets(source, "train")[1:].astype(int) - 1
        assert np.flatnonzero(prepared.tokens(source, "train") == prepared.tokenizer.end_id).tolist() == ends.tolist()
    without = DataConfig(sources=("a", "b"), vocabulary="bytes", validation_fraction=0.2, end_of_document=False)
    bare = prepare(without, tmp_path / "bare", sources=DOCUMENTS)
    assert not (bare.tokens("a", "train") == bare.tokenizer.end_id).any()
    assert documents_of(bare, "a", "train") == documents_of(prepared, "a", "train")


def test_counts_of_documents_tokens_and_bytes_are_those_of_the_text(prepared):
    for source in "ab":
        for split in ("train", "validation"):
            texts, counts = documents_of(prepared, source, split), prepared.meta["sources"][source][split]
            num_bytes = sum(len(text.encode()) for text in texts)
            assert counts == {"documents": len(texts), "tokens": num_bytes + len(texts), "bytes": num_bytes}
            assert prepared.num_tokens(source, split) == len(prepared.tokens(source, split))


def test_gzip_line_is_gzip_of_all_held_out_text(prepared):
    text = "".join(t for source in "ab" for t in documents_of(prepared, source, "validation")).encode()
    assert prepared.validation_gzip_bits_per_byte == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))


def test_a_trained_vocabulary_never_sees_held_out_text(tmp_path):
    data = DataConfig(sources=("a",), vocab_size=300, validation_fraction=0.2)
    texts = [f"common words {'ab' * (i % 9)} and {i}" for i in range(300)]
    plain = prepare(data, tmp_path / "plain", sources={"a": texts})
    held_out = set(documents_of(plain, "a", "validation"))
    assert plain.vocab_size == 300
    rest = [text for text in texts if text not in held_out]
    alone = module.SentencePieceTokenizer.train(rest, 300)
    assert plain.tokenizer.fingerprint == alone.fingerprint == plain.meta["tokenizer"]["fingerprint"]


def test_the_same_documents_give_the_same_files(prepared, tmp_path):
    again = prepare(BYTES, tmp_path / "again", sources={k: iter(v) for k, v in DOCUMENTS.items()})
    assert again.meta == prepared.meta


def test_a_second_call_loads_and_reads_no_document(prepared):
    def forbidden():
        raise AssertionError("read again")
        yield

    lock = prepared.directory.with_name(".data.lock")
    assert not lock.exists()
    assert prepare(BYTES, prepared.directory, sources={"a": forbidden(), "b": forbidden()}).meta == prepared.meta
    assert not lock.exists()  # a finished directory may lie where nobody can write


@pytest.mark.parametrize(
    ("field", "value"), [("validation_fraction", 0.1), ("end_of_document", False), ("vocabulary", "sentencepiece")]
)
def test_other_settings_in_a_prepared_directory_are_refused_by_name(prepared, field, value):
    other = DataConfig(**{**vars(BYTES), field: value})
    with pytest.raises(ConfigError, match=f"data.{field}=.* there, {value!r} in this config"):
        prepare(other, prepared.directory, sources=DOCUMENTS)


def test_other_sources_in_a_prepared_directory_are_refused(prepared):
    with pytest.raises(ConfigError, match=r"data\.sources=\['a', 'b'\] there, \['a'\] in this config"):
        prepare(DataConfig(**{**vars(BYTES), "sources": ("a",)}), prepared.directory, sources={"a": []})


def test_settings_that_do_not_touch_the_files_are_no_difference(prepared):
    other = DataConfig(**{**vars(BYTES), "mixture_weights": (1.0, 2.0), "document_attention": True, "vocab_size": 9999})
    assert prepare(other, prepared.directory).meta == prepared.meta


@pytest.mark.parametrize("ending", ["train.u32", "validation.offsets.u64", "tokenizer.json"])
def test_a_flipped_byte_is_found_and_the_file_named(prepared, ending):
    path = next(p for p in prepared.directory.iterdir() if p.name.endswith(ending))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=rf"{path.name} has changed: its sha256"):
        load(prepared.directory)


def test_a_shortened_and_a_missing_file_are_named(prepared):
    path = prepared.directory / "b-train.u32"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ConfigError, match=r"b-train\.u32 has \d+ bytes, not \d+"):
        load(prepared.directory)
    path.unlink()
    with pytest.raises(ConfigError, match=r"b-train\.u32 is missing"):
        load(prepared.directory)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no": "format"}'])
def test_a_broken_meta_file_is_named(prepared, text):
    (prepared.directory / "meta.json").write_text(text)
    with pytest.raises(ConfigError, match=r"meta\.json cannot be read"):
        load(prepared.directory)


def test_a_directory_of_another_format_or_without_meta_is_named(prepared, tmp_path):
    path = prepared.directory / "meta.json"
    path.write_text(json.dumps({**prepared.meta, "format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        load(prepared.directory)
    path.unlink()
    with pytest.raises(ConfigError, match="holds no prepared data"):
        load(prepared.directory)
    with pytest.raises(ConfigError, match="is no prepared data"):  # and its files are not overwritten
        prepare(BYTES, prepared.directory, sources=DOCUMENTS)
    assert (prepared.directory / "a-train.u32").exists()


KILLED = """
import os, sys, time
from pathlib import Path
from flmjax.config import DataConfig
from flmjax.data import prepare as module
from flmjax.data.sources.documents import Document

def stop(*_):
    print("ready", flush=True)
    time.sleep(60)

def documents():
    yield from (f"number {i}" for i in range(200))
    if sys.argv[2] == "reading":
        stop()

if sys.argv[2] == "sealed":
    module.publish = stop  # all files are written, meta.json too
data = DataConfig(sources=("x",), vocabulary="bytes", validation_fraction=0.2)
module.prepare(data, Path(sys.argv[1]), sources={"x": documents()})
"""


@pytest.mark.parametrize("moment", ["reading", "sealed"])
def test_after_kill_9_the_next_call_prepares_the_directory(tmp_path, moment):
    """Until then the directory does not exist."""
    directory = tmp_path / "data"
    process = subprocess.Popen([sys.executable, "-c", KILLED, directory, moment], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / ".data.partial").exists()
    with pytest.raises(ConfigError, match="holds no prepared data"):
        load(directory)
    data = DataConfig(sources=("x",), vocabulary="bytes", validation_fraction=0.2)
    done = prepare(data, directory, sources={"x": (f"number {i}" for i in range(100))})
    assert sum(done.meta["sources"]["x"][split]["documents"] for split in ("train", "validation")) == 100
    assert not (tmp_path / ".data.partial").exists()


def test_a_second_process_waits_for_the_first_and_loads_its_work(tmp_path):
    started, go = threading.Event(), threading.Event()
    done = []

    def slow():
        started.set()
        go.wait(30)
        yield from DOCUMENTS["a"]

    first = threading.Thread(
        target=lambda: done.append(prepare(BYTES, tmp_path / "d", sources={**DOCUMENTS, "a": slow()}))
    )
    first.start()
    assert started.wait(30)
    second = threading.Thread(target=lambda: done.append(prepare(BYTES, tmp_path / "d", sources={"a": [], "b": []})))
    second.start()
    time.sleep(0.3)
    assert second.is_alive()
    go.set()
    first.join(30)
    second.join(30)
    assert len(done) == 2
    assert done[0].meta == done[1].meta


def failing(message, sources, tmp_path, data=BYTES):
    with pytest.raises(ConfigError, match=message):
        prepare(data, tmp_path / "data", sources=sources)
    assert not list(tmp_path.iterdir())  # no incomplete directory, no lock


@pytest.mark.parametrize("empty", [[], ["", " \n\t"]])
def test_a_source_without_text_is_named(tmp_path, empty):
    failing("'b' has no documents", {"a": DOCUMENTS["a"], "b": empty}, tmp_path)


def test_no_held_out_document_says_how_to_get_one(tmp_path):
    """One file for each language, with data.split_by='path', has 0 and 0 held-out documents."""
    one = {"a": DOCUMENTS["a"], "b": [Document(text, "all.txt") for text in DOCUMENTS["a"]]}
    cures = r"two blank lines.*split_by='path'\), raise the fraction, or set its entry of data.mixture_weights to 0$"
    failing(rf"data\.sources: none of the 60 documents of 'b' is held out .*{cures}", one, tmp_path)
    by_path = DataConfig(**{**vars(BYTES), "split_by": "path"})
    failing(r"hold out by document with data\.split_by='text'", one, tmp_path, by_path)


def test_a_source_of_weight_0_needs_no_held_out_document(tmp_path):
    one = {"a": DOCUMENTS["a"], "b": [DOCUMENTS["a"][0]]}
    done = prepare(DataConfig(**{**vars(BYTES), "mixture_weights": (1.0, 0.0)}), tmp_path / "data", sources=one)
    assert done.meta["sources"]["b"]["validation"]["documents"] == 0
    line = data_warnings(done.meta["sources"], 64)[-1]
    assert "'b': its validation loss is not reliable: the held-out text has 0 documents, fewer than 10" in line


@pytest.mark.parametrize("is_prepared", [False, True])
def test_the_weights_of_every_stage_need_held_out_text(tmp_path, is_prepared):
    one = {"a": DOCUMENTS["a"], "b": [DOCUMENTS["a"][0]]}
    data = DataConfig(**{**vars(BYTES), "mixture_weights": (1.0, 0.0)})
    if is_prepared:
        prepare(data, tmp_path / "data", sources=one)
    stages = [StageConfig(name=str(w), mixture_weights=w) for w in (None, (1.0, 1.0), (3.0, 0.0))]
    mixtures = mixtures_of(RunConfig(data=data, stages=tuple(stages)))
    message = r"none of the 1 documents of 'b' is held out .* or set its entry of stages\[1\]\.mixture_weights to 0"
    with pytest.raises(ConfigError, match=message):
        prepare(data, tmp_path / "data", sources=one, mixtures=mixtures)
    assert (tmp_path / "data").exists() is is_prepared


def test_stages_without_a_source_need_none_of_its_text_held_out(tmp_path):
    one = {"a": DOCUMENTS["a"], "b": [DOCUMENTS["a"][0]]}
    mixtures = mixtures_of(RunConfig(data=BYTES, stages=(StageConfig(mixture_weights=(1.0, 0.0)), StageConfig())))
    assert prepare(BYTES, tmp_path / "data", sources=one, mixtures=mixtures).sources == ("a", "b")


def test_the_only_source_has_no_weight_to_lower(tmp_path):
    failing(
        r"split_by='path'\), or raise the fraction$",
        {"a": [DOCUMENTS["a"][0]]},
        tmp_path,
        replace(BYTES, sources=("a",)),
    )


def test_little_held_out_text_is_said_by_source():
    """A validation loss stood on 99 tokens, and nothing said so."""
    enough, few, short = ({"documents": d, "tokens": t} for d, t in ((10, 65), (9, 9000), (11, 64)))
    counts = {name: {"validation": of_name} for name, of_name in (("x", enough), ("a", short), ("b", few))}
    lines = data_warnings(counts, 64)
    assert len(lines) == 2
    assert "source 'a': " in lines[0]
    assert "64 tokens, which do not fill a sequence of 64" in lines[0]
    assert "source 'b': " in lines[1]
    assert "9 documents, fewer than 10" in lines[1]
    assert "data.validation_fraction" in lines[1]


def test_a_source_without_training_documents_is_named(tmp_path, prepared):
    held_out = documents_of(prepared, "a", "validation")[:1]
    (tmp_path / "other").mkdir()
    failing("every document of 'b' is held out", {"a": DOCUMENTS["a"], "b": held_out}, tmp_path / "other")


def test_a_lone_surrogate_is_named_with_its_document(tmp_path):
    bad = [*DOCUMENTS["a"], "ab\ud83dc"]
    failing(r"document 60 of 'a' holds U\+D83D at character 2", {"a": bad, "b": DOCUMENTS["b"]}, tmp_path)


def test_a_document_that_is_no_text_is_named(tmp_path):
    failing("document 0 of 'a' is of type bytes, not str", {"a": [b"x"], "b": []}, tmp_path)


def test_names_of_sources_must_be_those_of_the_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"sources are \['c'\], but data.sources and data.teachers are \['a', 'b'\]"):
        prepare(BYTES, tmp_path / "data", sources={"c": []})


def test_a_file_that_is_not_utf8_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "t.txt").write_bytes(b"ok\n\n\nabc\xfe")
    (tmp_path / "out").mkdir()
    data = DataConfig(sources=(f"{tmp_path}/bad",), vocabulary="bytes")
    failing(r"t\.txt: not UTF-8 at byte 8 \(0xFE\)", None, tmp_path / "out", data)


def test_paths_that_look_alike_get_different_files(tmp_path):
    names = (f"{tmp_path}/x.y.txt", f"{tmp_path}/x-y.txt", f"{tmp_path}/文.txt", f"{tmp_path}/字.txt")
    for name in names:
        with open(name, "w") as file:
            file.write("\n\n\n".join(f"{name} {i}" for i in range(50)))
    done = prepare(DataConfig(sources=names, vocabulary="bytes", validation_fraction=0.2), tmp_path / "data")
    assert done.sources == names
    assert len({counts["slug"] for counts in done.meta["sources"].values()}) == 4
    for name in names:
        assert documents_of(done, name, "train")[0].startswith(name)


def test_documents_of_one_key_are_on_one_side_in_all_sources(tmp_path):
    pages = {lang: [Document(f"{lang} {i}", key=f"page {i // 3}") for i in range(300)] for lang in "ab"}
    done = prepare(BYTES, tmp_path / "data", sources=pages)
    numbers = {
        split: {int(text[2:]) // 3 for lang in "ab" for text in documents_of(done, lang, split)}
        for split in ("train", "validation")
    }
    assert numbers["train"].isdisjoint(numbers["validation"])
    assert len(numbers["validation"]) > 5


def test_a_source_with_splits_keeps_them(tmp_path):
    split = lambda i: "validation" if i < 7 else "train"
    documents = [Document(f"text {i}", split=split(i)) for i in range(40)]
    done = prepare(BYTES, tmp_path / "data", sources={"a": documents, "b": DOCUMENTS["b"]})
    assert documents_of(done, "a", "validation") == [f"text {i}" for i in range(7)]


def test_directories_from_before_there_were_teachers_are_read(prepared):
    """With teachers in the settings they are refused."""
    path = prepared.directory / "meta.json"
    old = {"sources": ["a", "b"], "vocabulary": "bytes", "validation_fraction": 0.2, "end_of_document": True}
    path.write_text(json.dumps({**prepared.meta, "settings": old}))
    assert prepare(BYTES, prepared.directory).sources == ("a", "b")
    with pytest.raises(ConfigError, match=r"data\.teachers=\[\] there, \['t'\] in this config"):
        prepare(DataConfig(**{**vars(BYTES), "teachers": ("t",)}), prepared.directory)


def test_cl100k_and_a_model_file_are_vocabularies(tmp_path, prepared):
    texts = {"a": [f"words and words {i} <|endoftext|>" for i in range(200)], "b": DOCUMENTS["b"]}
    data = DataConfig(**{**vars(BYTES), "vocabulary": "cl100k", "end_id": 1432})
    done = prepare(data, tmp_path / "cl100k", sources=texts)
    assert (done.vocab_size, done.tokenizer.end_id) == (100256, 1432)
    trained = prepare(
        DataConfig(**{**vars(BYTES), "vocabulary": None, "vocab_size": 320}), tmp_path / "t", sources=texts
    )
    path = str(trained.directory / "tokenizer.model")
    again = prepare(DataConfig(**{**vars(BYTES), "vocabulary": path}), tmp_path / "again", sources=texts)
    assert again.tokenizer.fingerprint == trained.tokenizer.fingerprint
    for variant in (done, trained, again):
        assert documents_of(variant, "a", "train") == documents_of(done, "a", "train")


@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece"])
def test_an_end_id_that_is_not_read_is_refused(tmp_path, vocabulary):
    data = DataConfig(**{**vars(BYTES), "vocabulary": vocabulary, "end_id": 7})
    failing(r"data\.end_id=7", DOCUMENTS, tmp_path, data)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"task_module": "other_tasks"}, False),  # may register another mixture of this name
        ({"mixture": "other"}, False),
        ({"vocabulary": "cl100k"}, False),
        ({"vocab_size": 500}, True),  # not read
        ({"teacher_weight": 2.0}, True),
    ],
    ids=str,
)
def test_settings_have_the_same_preparation_or_another(change, is_same):
    data = DataConfig(mixture="texts", task_module="my_tasks", vocabulary="bytes")
    assert has_same_preparation(data, dataclasses.replace(data, **change)) == is_same
