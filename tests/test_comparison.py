"""Several runs on one page: their curves, their newest numbers, and the settings in which they differ."""

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import STAGES, Page, change, make_teacher_workdir, make_workdir, read_lines

from flmjax import cli
from flmjax.config import ConfigError
from flmjax.report.comparison import comparison_figure, write_comparison
from flmjax.report.run_record import read_run


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """The run `a` of two stages and the run `b` of one, with other losses."""
    make_workdir(tmp_path / "a")
    change(tmp_path / "a", "validation", loss=1.25, bits_per_byte=2.0)
    make_workdir(tmp_path / "b", stages=(dataclasses.replace(STAGES[0], steps=5, learning_rate=2e-3),))
    change(tmp_path / "b", "validation", loss=1.5, bits_per_byte=2.125)
    return [tmp_path / "a", tmp_path / "b"]


def checksums(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_the_command_prints_the_page_and_changes_no_run(runs, tmp_path, monkeypatch, capsys):
    before = checksums(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *(f"--workdir={run}" for run in runs)]) == 0
    assert capsys.readouterr().out == "comparison: comparison/a-vs-b.html\n"
    assert checksums(tmp_path).items() - before.items() == checksums(tmp_path / "comparison").items()
    assert cli.main(["report", *(f"--workdir={run}" for run in runs), "--output=a"]) == 0
    assert before.items() <= checksums(tmp_path).items()
    assert (tmp_path / "a" / "a-vs-b.html").exists()


def test_the_page_has_the_newest_numbers_and_needs_no_other_file(runs, tmp_path):
    page = Page(write_comparison(runs, tmp_path / "out"))
    assert page.open == []
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"] * 2
    table = page.table(0)
    expected = {"run": "a", "step": "6 of 6", "tokens": "192", "FLOPs": "295 kFLOP", "parameters": "486"}
    expected |= {"val. loss": "1.250", "val. bits/byte": "2.000", "gzip -9 bits/byte": "2.500"}
    assert table["a"].items() >= expected.items()
    expected = {"step": "5 of 5", "tokens": "160", "parameters": "182", "val. loss": "1.500", "val. bits/byte": "2.125"}
    assert table["b"].items() >= expected.items()
    assert "differ:" not in page.text  # one vocabulary and one held-out text


def test_the_settings_that_differ_are_listed_alone(runs, tmp_path):
    table = Page(write_comparison(runs, tmp_path / "out")).table(1)
    assert table["stages[0].steps"] == {"setting": "stages[0].steps", "a": "4", "b": "5"}
    assert table["stages[0].learning_rate"]["b"] == "0.002"
    assert table["stages[1].embed_dim"] == {"setting": "stages[1].embed_dim", "a": "8", "b": "-"}
    assert not any(path.startswith(("model.", "data.", "stages[0].batch")) for path in table)


def test_equal_settings_are_said_to_be_equal(tmp_path):
    for name in "ab":
        make_workdir(tmp_path / name)
    assert "Settings that differ None." in Page(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path)).text


def test_every_run_has_a_colour_and_its_logged_numbers(runs):
    records = {run.name: read_run(run) for run in runs}
    panels = comparison_figure(records, columns=2).axes
    axes = [("tokens", "loss"), ("flops", "loss"), ("tokens", "bits_per_byte"), ("flops", "bits_per_byte")]
    for panel, (x, y) in zip(panels, axes, strict=True):
        drawn = {line.get_label(): line for line in panel.get_lines()}
        colors = []
        for run in runs:
            of_kinds = [drawn[f"{run.name}, {kind}"] for kind in ("train", "validation")]
            for kind, curve in zip(("train", "validation"), of_kinds, strict=True):
                lines = [line for line in read_lines(run) if line["kind"] == kind]
                np.testing.assert_array_equal(curve.get_xydata(), [[line[x], line[y]] for line in lines])
            colors += {curve.get_color() for curve in of_kinds}
        assert len(set(colors)) == len(colors) == 2
        assert panel.get_xlim()[1] == max(record.last[x] for record in records.values())


def test_runs_of_other_vocabularies_and_texts_are_told_apart(tmp_path):
    make_workdir(tmp_path / "a")
    make_teacher_workdir(tmp_path / "b", alternating=True, vocab_size=12)
    meta = tmp_path / "b" / "data" / "meta.json"
    meta.write_text(meta.read_text().replace("2.5", "2.75"))
    text = Page(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path)).text
    assert "The vocabularies differ: compare bits per byte, not losses per token." in text
    assert "The held-out texts differ" in text


def test_folders_of_one_name_have_different_names_on_the_page(tmp_path):
    folders = [tmp_path / name / "run" for name in ("first", "second", "third <b>")]
    for folder in folders:
        make_workdir(folder)
    path = write_comparison(folders, tmp_path / "out")
    names = [row[0] for row in Page(path).tables[0][1:]]
    assert names == ["first_run", "second_run", "third_b_run"]
    assert path.name == "first_run-vs-second_run-vs-third_b_run.html"


def test_comparisons_of_names_that_begin_alike_have_files_of_their_own(tmp_path):
    folders = [tmp_path / f"{'long' * 10}_{name}" for name in "abc"]
    for folder in folders:
        make_workdir(folder)
    pages = [write_comparison([folders[0], other], tmp_path / "out") for other in folders[1:]]
    assert pages[0] != pages[1]
    assert all(len(page.name) < 80 for page in pages)


def test_a_folder_named_twice_is_refused(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs[0])
    for again in (runs[0], tmp_path / "b" / ".." / "a", tmp_path / "link"):
        with pytest.raises(ConfigError, match=f"--workdir={re.escape(str(again))} is the folder of another --workdir"):
            write_comparison([*runs, again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_run_has_its_report_in_the_output_folder(runs, tmp_path, capsys):
    before = checksums(runs[0])
    assert cli.main(["report", f"--workdir={runs[0]}", f"--output={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'out' / 'report.html'}\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["loss.png", "report.html"]
    assert checksums(runs[0]) == before
