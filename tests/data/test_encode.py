"""Tokenising in parts: the same files from any number of processes, through any kill."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flmjax.config import ConfigError, DataConfig
from flmjax.data import encode
from flmjax.data.prepare import PROGRESS_FILE, prepare

FOLDER_FILES = 3
DOCUMENTS = 400


@pytest.fixture
def small_parts(monkeypatch):
    """Many parts of little text, and processes for it."""
    monkeypatch.setattr(encode, "PART_BYTES", (1000, 1000))
    monkeypatch.setattr(encode, "PROCESSES_FROM", 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files of some 400 documents each, 文 in it."""
    path = tmp_path / "text"
    path.mkdir()
    for k in range(FOLDER_FILES):
        texts = (f"document {i} of file {k}: 文档 {'word ' * (i % 17)}" for i in range(DOCUMENTS))
        (path / f"{k}.txt").write_text("\n\n\n".join(texts))
    return path


def settings(folder: Path, **fields) -> DataConfig:
    return DataConfig(sources=(str(folder),), vocabulary="bytes", validation_fraction=0.2, **fields)


@pytest.fixture
def plain(folder, tmp_path):
    """One part in one process."""
    return prepare(settings(folder), tmp_path / "plain")


def same(prepared, plain) -> bool:
    return prepared.meta == plain.meta


def test_many_parts_in_processes_give_the_files_of_one(small_parts, folder, plain, tmp_path):
    assert same(prepare(settings(folder, workers=3), tmp_path / "data"), plain)
    assert same(prepare(settings(folder, workers=1), tmp_path / "alone"), plain)


def test_every_document_is_in_one_part_in_order(small_parts, folder, plain, tmp_path):
    """Also a document that is larger than a part."""
    texts = ["a" * 10, "b" * 5000, "c" * 990, "d" * 10, "e"]
    data = DataConfig(sources=("x",), vocabulary="bytes", validation_fraction=0.01, end_of_document=False)
    prepared = prepare(data, tmp_path / "data", sources={"x": [*texts, *(f"held {i}" for i in range(300))]})
    decoded = prepared.tokenizer.decode(prepared.tokens("x", "train"))
    assert decoded.startswith("".join(texts))


KILLED = """
import sys, time
from pathlib import Path
from flmjax.config import ConfigError, DataConfig
from flmjax.data import encode, prepare as module

encode.PART_BYTES, encode.PROCESSES_FROM = (1000, 1000), 0
real = encode.encoded
def slow(*args):
    for i, part in enumerate(real(*args)):
        if i == 5:
            print("ready", flush=True)
            time.sleep(60)
        yield part

if __name__ == "__main__":
    encode.encoded = slow
    data = DataConfig(sources=(sys.argv[1],), vocabulary="bytes", validation_fraction=0.2, workers=2)
    module.prepare(data, Path(sys.argv[2]))
"""


@pytest.fixture
def killed(folder, tmp_path) -> Path:
    """A directory whose preparation was killed with kill -9 while it tokenised, and its parts of then."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, script, folder, tmp_path / "data"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    deadline = time.monotonic() + 30
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_lives(process.pid), "workers outlived the process that started them"
    return tmp_path / "data"


def group_lives(group: int) -> bool:
    """Whether a process of the group runs (a zombie does not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rsplit(") ", 1)[1].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            return True
    return False


def parts_of(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in directory.with_name(".data.partial").glob("*.part*.npz")}


def test_after_kill_9_sources_and_parts_are_kept(small_parts, killed, folder, plain, monkeypatch):
    before = parts_of(killed)
    assert len(before) >= 5
    written = []
    real = encode.Encoder.encode
    monkeypatch.setattr(encode.Encoder, "encode", lambda self, part: written.append(part.path.name) or real(self, part))
    monkeypatch.setattr("flmjax.data.spool.Spool.fill", None)  # would be called to read again
    prepared = prepare(settings(folder, workers=1), killed)
    assert same(prepared, plain)
    assert written
    assert not {name for name in before if "tmp" not in name} & set(written)
    assert not killed.with_name(".data.partial").exists()


def test_text_that_changed_after_the_kill_is_read_again(small_parts, killed, folder, tmp_path):
    (folder / "0.txt").write_text("\n\n\n".join(f"new {i}" for i in range(100)))
    prepared = prepare(settings(folder, workers=1), killed)
    assert same(prepared, prepare(settings(folder), tmp_path / "fresh"))


@pytest.mark.parametrize("fields", [{"end_of_document": False}, {"validation_fraction": 0.1}])
def test_other_settings_after_the_kill_start_anew(small_parts, killed, folder, tmp_path, fields):
    other = dataclasses.replace(settings(folder, workers=1), **fields)
    assert same(prepare(other, killed), prepare(other, tmp_path / "fresh"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a complete archive"])
def test_a_damaged_part_is_written_again(small_parts, killed, folder, plain, content):
    partial = killed.with_name(".data.partial")
    next(iter(partial.glob("*.part000001.npz"))).write_bytes(content)
    assert same(prepare(settings(folder, workers=1), killed), plain)


@pytest.mark.parametrize("name", [PROGRESS_FILE, "*.columns.npz", "*-train.text"])
def test_damaged_notes_of_a_killed_process_are_not_trusted(small_parts, killed, folder, plain, name):
    path = next(iter(killed.with_name(".data.partial").glob(name)))
    path.write_bytes(path.read_bytes()[:-7])
    assert same(prepare(settings(folder, workers=1), killed), plain)


def test_a_worker_that_fails_ends_the_call_and_leaves_no_directory(small_parts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "encode_in_worker", failing)
    with pytest.raises(OSError, match="disk is full"):
        prepare(settings(folder, workers=2), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def failing(part):
    raise OSError("disk is full")


def test_a_document_of_fifty_megabytes_is_one_document(tmp_path):
    line = "a line of text that is not very long 与中文\n"
    path = tmp_path / "long.md"
    with path.open("w") as file:
        file.writelines(line for _ in range(50_000_000 // len(line.encode()) + 1))
    (tmp_path / "short.md").write_text("short")
    for vocabulary, limit in (("bytes", 20), ("cl100k", 40)):
        sources = (f"{tmp_path}/*.md", f"{tmp_path}/many.txt")
        data = DataConfig(sources=sources, vocabulary=vocabulary, mixture_weights=(0.0, 1.0))
        (tmp_path / "many.txt").write_text("\n\n\n".join(f"text {i}" for i in range(100)))
        start = time.monotonic()
        prepared = prepare(data, tmp_path / vocabulary)
        assert time.monotonic() - start < limit
        counts = prepared.meta["sources"][f"{tmp_path}/*.md"]["train"]
        assert counts["documents"] == 2
        assert counts["bytes"] > 50_000_000
        start_of_text = np.asarray(prepared.tokens(f"{tmp_path}/*.md", "train")[:200])
        assert prepared.tokenizer.decode(start_of_text).startswith(line)


def test_every_core_gets_a_process_and_every_process_a_part(monkeypatch, folder, tmp_path):
    processes = []
    monkeypatch.setattr(encode, "PROCESSES_FROM", 0)
    monkeypatch.setattr(encode, "encoded", lambda parts, encoder, folder, workers: processes.append(workers) or ())
    monkeypatch.setattr(encode.Encoder, "read", lambda self, part: 1 / 0)  # nothing was written
    with pytest.raises(ZeroDivisionError):
        prepare(settings(folder), tmp_path / "data")
    assert processes == [min(2, len(os.sched_getaffinity(0)))]  # two parts: train and validation


def test_another_vocabulary_after_the_kill_keeps_no_part(small_parts, killed, folder, plain):
    """The parts of the killed process stay, but the vocabulary of their ids is said to be another."""
    (killed.with_name(".data.partial") / "vocabulary.txt").write_text("another")
    for path in killed.with_name(".data.partial").glob("*.part??????.npz"):
        with np.load(path) as stored:
            columns = dict(stored)
        np.savez(path, allow_pickle=False, **{**columns, "tokens": columns["tokens"] ^ 1})
    (killed.with_name(".data.partial") / "tokenizer.model").write_bytes(b"of another attempt")
    assert same(prepare(settings(folder, workers=1), killed), plain)
    assert not (killed / "tokenizer.model").exists()


def test_an_impossible_vocabulary_is_refused_before_reading(tmp_path):
    def read():
        raise AssertionError("read")
        yield

    data = DataConfig(sources=("x",), vocabulary=f"{tmp_path}/none.model")
    with pytest.raises(ConfigError, match=r"none\.model cannot be read"):
        prepare(data, tmp_path / "data", sources={"x": read()})
    data = DataConfig(sources=("x",), teachers=("t",), vocabulary="bytes", true_mark="a", false_mark="bc")
    with pytest.raises(ConfigError, match="take marks of one length"):
        prepare(data, tmp_path / "data", sources={"x": read(), "t": read()})
