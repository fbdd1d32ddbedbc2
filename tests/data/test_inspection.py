"""What `flmjax prepare --inspect` says of the data."""

import json
import os
import re

import numpy as np
import pytest

from flmjax import cli
from flmjax.config import ConfigError, DataConfig
from flmjax.data import prepared as prepared_module
from flmjax.data.inspection import inspected_samples, show_row, show_samples, summary
from flmjax.data.loader import TrainingStream
from flmjax.data.mixture import MixturePhase
from flmjax.data.prepare import prepare
from flmjax.data.prepared import VERIFIED_FILE, load
from flmjax.data.sources.documents import Document
from flmjax.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def row_of(text: str, weights: str, segments: str | None = None) -> dict[str, np.ndarray]:
    """A row whose stream is `text` (| is the end token), with a weight and a segment for each target."""
    ids = np.array([256 if c == "|" else ord(c) for c in text], np.int32)
    row = {"tokens": ids[:-1], "targets": ids[1:], "weights": np.array([int(w) for w in weights], np.float32)}
    if segments is not None:
        row["segment_ids"] = np.array([int(s) for s in segments], np.int32)
    return row


def test_a_row_of_text_shows_ends_of_documents_and_padding():
    assert show_row(row_of("ab|cd|||", "1111100"), BYTES) == (
        "5 tokens, 5 in the loss\n[segment 1] ab<end>cd<end>\n[2 padding]"
    )


def test_documents_kept_apart_are_shown_as_segments():
    """The target at a border, the next document's first token, is shown once."""
    shown = show_row(row_of("ab|cd|e", "110110", "111222"), BYTES)
    assert shown == "6 tokens, 4 in the loss\n[segment 1] ab<end>\n[segment 2] cd<end>"


def test_text_outside_the_loss_is_in_brackets_or_faint():
    row = row_of("is it?YZ", "0000011", "1111111")
    assert show_row(row, BYTES).splitlines()[1] == "[segment 1] ⟦is it?⟧YZ"
    assert show_row(row, BYTES, terminal=True).splitlines()[1] == "[segment 1] \x1b[2mis it?\x1b[0mYZ"


@pytest.fixture
def prepared(tmp_path):
    data = DataConfig(sources=("text",), teachers=("teacher",), vocabulary="bytes", validation_fraction=0.2)
    texts = [f"text {i:05d}" for i in range(1200)] + ["text 00001", "text 00002"]
    teacher = [Document(f"proposition {i}?", f"{i // 2}", i % 2 == 0) for i in range(100)]
    return prepare(data, tmp_path / "data", sources={"text": texts, "teacher": teacher})


def test_the_table_has_counts_shares_and_duplicates(prepared):
    schedule = (MixturePhase((0.9, 0.1), None),)
    lines = summary(TrainingStream(prepared, DataConfig(), 0, 8, schedule)).splitlines()
    assert lines[0] == (
        f"{prepared.directory}: vocabulary of 257 ids, id 256 ends a document; 2 documents repeat another one, "
        "0 held-out texts are also in the training text"
    )
    marks = "true 😈 [240, 159, 152, 136], false 😡 [240, 159, 152, 161]"
    assert lines[1] == f"marks: {marks}; token 4 decides"
    cells = [line.split() for line in lines[2:]]
    assert cells[0] == ["source", "split", "documents", "tokens", "bytes", "bytes/token", "share", "duplicates"]
    counts = prepared.meta["sources"]["text"]["train"]
    assert cells[1][:3] == ["text", "train", str(counts["documents"])]
    assert cells[1][3:] == [f"{counts['tokens']:,}", f"{counts['bytes']:,}", "0.91", "90.0%", "2"]
    assert cells[3][:3] == ["teacher", "(teacher)", "train"]
    assert cells[3][-2:] == ["10.0%", "0"]


CONFIG = """
from flmjax.config import *
def get_config():
    data = DataConfig(sources=("{0}/a.jsonl",), teachers=("{0}/t.jsonl",), vocabulary="bytes", validation_fraction=0.2)
    return to_config_dict(RunConfig(data=data, model=ModelConfig(max_length=48)))
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"a text {i}"}) for i in range(200)))
    rows = ({"proposition": f"is {i} even? ", "judgement": i % 2 == 0} for i in range(100))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    return f"--config={tmp_path}/config.py"


def test_the_command_line_prints_the_table_and_samples(config, tmp_path, capsys):
    assert cli.main(["prepare", config, f"--workdir={tmp_path}/w", "--inspect=12"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- sample") == 12
    assert re.search(r"sample \d+, text: 48 tokens", out)  # the order of the sources depends on their paths
    assert "? ⟧😈" in out or "? ⟧😡" in out


@pytest.mark.parametrize("first", ["1,0,0", None])
def test_a_stage_with_text_that_has_none_held_out_is_refused(config, tmp_path, capsys, first):
    """The stage's weights went past the check, and the run printed a validation loss that was not a number."""
    (tmp_path / "one.txt").write_text("a single document")
    sources = f"--config.data.sources={tmp_path}/a.jsonl,{tmp_path}/one.txt"
    command = ["prepare", config, f"--workdir={tmp_path}/w", sources, "--config.data.mixture_weights=1,0,0"]
    if first is not None:
        assert cli.main([*command, f"--config.stages[0].mixture_weights={first}"]) == 0
    assert cli.main([*command, "--config.stages[0].mixture_weights=1,1,0"]) == 2
    assert "set its entry of stages[0].mixture_weights to 0" in capsys.readouterr().err


def test_inspected_samples_are_of_every_source_first(prepared):
    """Four samples of a mixture with 1.9 % of a teacher were four texts."""
    rare, late = ((0.981, 0.019), None), ((0.9, 0.1), None)
    stream = TrainingStream(prepared, DataConfig(), 0, 8, (MixturePhase(*rare),))
    first = next(n for n in range(99) if stream.source_samples(0, n + 1)[1])
    assert first > 4
    assert inspected_samples(stream, 4) == [0, 1, 2, first]
    assert inspected_samples(stream, 1) == [0]
    assert inspected_samples(stream, 0) == []
    assert list(show_samples(stream, 2))[1].startswith(f"--- sample {first}, teacher")
    phases = (MixturePhase((1.0, 0.0), 10**9), MixturePhase(*late))
    joins = inspected_samples(TrainingStream(prepared, DataConfig(), 0, 8, phases), 2)
    assert joins[0] == 0
    assert 10**9 <= joins[1] < 10**9 + 10
    alone = (MixturePhase((1.0, 0.0), None),)
    assert inspected_samples(TrainingStream(prepared, DataConfig(), 0, 8, alone), 3) == [0, 1, 2]


def test_inspect_shows_no_sample_by_default(config, tmp_path, capsys):
    """A negative number of samples is refused."""
    assert cli.main(["prepare", config, f"--workdir={tmp_path}/w"]) == 0
    assert "--- sample" not in capsys.readouterr().out
    assert cli.main(["prepare", config, f"--workdir={tmp_path}/w", "--inspect=-1"]) == 2


def test_a_checksum_is_computed_again_if_the_file_changed(prepared, monkeypatch):
    """Or on demand."""
    read = []
    real = prepared_module.sha256
    monkeypatch.setattr(prepared_module, "sha256", lambda path: read.append(path.name) or real(path))
    load(prepared.directory)
    assert read == []  # correct when it was written
    path = prepared.directory / "text-train.u32"
    os.utime(path)
    load(prepared.directory)
    assert read == ["text-train.u32"]
    load(prepared.directory, full=True)
    assert len(read) == 1 + len(prepared.meta["files"])


def test_damage_that_keeps_size_and_time_is_found_by_prepare(prepared, config, tmp_path, capsys):
    cli.main(["prepare", config, f"--workdir={tmp_path}/w"])
    path = next((tmp_path / "w" / "data").glob("*train.u32"))
    stat, raw = path.stat(), bytearray(path.read_bytes())
    raw[4] ^= 1
    with path.open("r+b") as file:
        file.write(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load(tmp_path / "w" / "data")  # a run trusts an earlier check
    assert cli.main(["prepare", config, f"--workdir={tmp_path}/w"]) == 2
    assert "has changed: its sha256" in capsys.readouterr().err
    (tmp_path / "w" / "data" / VERIFIED_FILE).write_text("{")
    with pytest.raises(ConfigError, match="has changed"):
        load(tmp_path / "w" / "data")
