"""What the report says of a run's origin: sources of its data, wall time and machine of every start, parent run."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from report_runs import STAGES, make_workdir, read_lines, report, write_lines

from flmjax.config import ConfigError, to_stored
from flmjax.data.prepare import prepare
from flmjax.report.run_figure import run_figure
from flmjax.report.run_record import read_run
from flmjax.workdir.paths import Parent, write_parent


def make_run_of_two_sources(workdir: Path) -> None:
    """Two sources, 3 : 1 in the first stage and 1 : 1 in the second; both are short, so that epochs are many."""
    stages = (
        dataclasses.replace(STAGES[0], mixture_weights=(3.0, 1.0)),
        dataclasses.replace(STAGES[1], mixture_weights=(0.5, 0.5)),
    )
    config = make_workdir(workdir, stages=stages)
    data = dataclasses.replace(config.data, sources=("texts/a", "texts/b"))
    texts = {"texts/a": [f"a{i:04}" * 19 for i in range(100)], "texts/b": [f"b{i:04}" * 9 for i in range(100)]}
    (workdir / "data" / "meta.json").unlink()
    prepare(data, workdir / "data", sources={name: iter(of_name) for name, of_name in texts.items()})
    config = dataclasses.replace(config, data=data)
    (workdir / "config.json").write_text(json.dumps(to_stored(config)))


def test_sources_have_their_tokens_shares_and_epochs(tmp_path):
    make_run_of_two_sources(tmp_path)
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    tokens = [meta["sources"][source]["train"]["tokens"] for source in ("texts/a", "texts/b")]
    # 4 steps of 2 samples at 3 : 1, then 2 steps at 1 : 1: 6 + 2 = 8 and 2 + 2 = 4 samples of 16 tokens.
    rows = [math.ceil((count - 1) / 16) for count in tokens]
    table = report(tmp_path).table(1)
    common = {"share in large": "50.0%"}
    for label, count, share, epochs in zip("ab", tokens, ("75.0%", "25.0%"), (8 / rows[0], 4 / rows[1]), strict=True):
        expected = {"source": label, "training tokens": f"{count:,}", "share in small": share}
        assert table[label] == expected | common | {"epochs so far": f"{epochs:.2f}"}


def test_a_run_without_its_token_files_is_reported(tmp_path):
    make_run_of_two_sources(tmp_path)
    for file in (tmp_path / "data").glob("*.u*"):
        file.unlink()
    before = sorted((tmp_path / "data").iterdir())
    row = report(tmp_path).table(1)["a"]
    assert (row["share in small"], row["epochs so far"]) == ("75.0%", "-")
    assert sorted((tmp_path / "data").iterdir()) == before  # nothing is prepared for a report
    for file in before:
        file.unlink()
    assert "Sources" not in report(tmp_path).text


def write_starts(workdir: Path, *seconds: dict[str, float]) -> None:
    origin = {
        "command": "flmjax train --workdir=<run>",
        "folder": "/home/me",
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "commit": "0123456789abcdef",
        "is_dirty": True,
        "device": "NVIDIA H200",
        "devices": 8,
        "date": "2026-11-29T08:43:33+00:00",
        "peak_flops": 69e9,
        "peak_source": "measured on this machine",
    }
    steps = ({"first_step": 4 * i, "last_step": 4 * i + 4} for i in range(len(seconds)))
    lines = ({**origin, **of_start, "seconds": times} for of_start, times in zip(steps, seconds, strict=True))
    (workdir / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_wall_time_is_the_sum_of_all_starts(tmp_path):
    make_workdir(tmp_path)
    write_starts(tmp_path, {"updates": 10.0, "growth": 20.0, "samples": 0.0}, {"updates": 50.0, "compilation": 20.0})
    page = report(tmp_path)
    table = page.tables[2]
    assert table[1:] == [
        ["new updates", "60.0 s", "60.0%"],
        ["growth", "20.0 s", "20.0%"],
        ["compilation", "20.0 s", "20.0%"],
        ["all", "100.0 s", "100.0%"],
    ]
    assert "Training time 100.0 s 60% of it new updates" in page.text
    assert "Tokens 192 step 6 of 6" in page.text


def test_every_start_is_a_row_with_its_origin(tmp_path):
    make_workdir(tmp_path)
    write_starts(tmp_path, {"updates": 1.0}, {"updates": 1.0})
    page = report(tmp_path)
    head, *rows = page.tables[3]
    assert [row[1] for row in rows] == ["0 to 4", "4 to 8"]
    row = dict(zip(head, rows[0], strict=True))
    expected = {"date": "2026-11-29 08:43:33+00:00", "steps": "0 to 4", "devices": "8 x NVIDIA H200"}
    expected |= {"versions": "python 3.11.7, jax 0.10.2", "commit": "0123456789ab, with changes"}
    assert row == expected | {"command line": "flmjax train --workdir=<run>\nin /home/me"}


def test_a_measured_peak_is_named_as_such(tmp_path):
    make_workdir(tmp_path)
    write_starts(tmp_path, {"updates": 1.0})
    assert (
        "Utilisation: model FLOP/s by a peak of 69 GFLOP/s a device, measured on this machine." in report(tmp_path).text
    )
    titles = [panel.get_title(loc="left") for panel in run_figure(read_run(tmp_path), columns=2).axes]
    assert "Model FLOPs utilisation of a measured peak" in titles


@pytest.mark.parametrize("entry", [{}, {"seconds": {"updates": None}}, {"versions": None, "devices": None}])
def test_an_entry_that_lacks_values_is_reported(tmp_path, entry):
    make_workdir(tmp_path)
    (tmp_path / "starts.jsonl").write_text(json.dumps(entry) + "\n")
    assert "Starts" in report(tmp_path, draw=not entry).text


# ---- parent ---------------------------------------------------------------------------------------------------------


def make_grown_run(folder: Path) -> Parent:
    """The run `parent` of 6 steps and 192 tokens, and the run `grown` of 4 steps and 128 tokens, grown from step 4."""
    make_workdir(folder / "parent")
    make_workdir(folder / "grown", stages=STAGES[:1])
    parent = Parent(str(folder / "parent"), step=4, stage="small", tokens=128, first_sample=0)
    write_parent(parent, folder / "grown")
    return parent


def test_a_grown_run_shows_its_parents_loss_before_its_own(tmp_path):
    make_grown_run(tmp_path)
    text = report(tmp_path / "grown").text
    assert f"Grown from {tmp_path / 'parent'}, step 4 of stage small; its loss is grey in the picture." in text
    panels = {panel.get_title(loc="left"): panel for panel in run_figure(read_run(tmp_path / "grown"), columns=2).axes}
    for title, name in {"Loss (nats per token)": "loss", "Bits per byte": "bits_per_byte"}.items():
        drawn = {line.get_label(): line.get_xydata().tolist() for line in panels[title].get_lines()}
        lines = [x for x in read_lines(tmp_path / "parent") if x["kind"] == "train" and x["step"] <= 4]
        assert drawn["parent, parent"] == [[line["tokens"] - 128, line[name]] for line in lines]
        assert drawn["train"][0][0] == 32
        assert panels[title].get_xlim() == (-128, 128)
    assert panels["Learning rate"].get_xlim() == (0, 128)


def test_a_long_parent_is_shown_for_as_many_tokens_as_the_run_has(tmp_path):
    make_grown_run(tmp_path)
    lines = read_lines(tmp_path / "grown")
    write_lines(tmp_path / "grown", [line for line in lines if line["step"] <= 2])  # 64 tokens
    panel = run_figure(read_run(tmp_path / "grown"), columns=2).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
    assert [x for x, _ in drawn["parent, parent"]] == [-64, -32, 0]


@pytest.mark.parametrize("what", ["gone", "broken", "another run"])
def test_a_parent_that_is_no_longer_there_is_named(tmp_path, what):
    make_grown_run(tmp_path)
    metrics = tmp_path / "parent" / "metrics.jsonl"
    if what == "gone":
        shutil.rmtree(tmp_path / "parent")
    elif what == "broken":
        metrics.write_text("{\n" + metrics.read_text())
    else:  # a run that has not come to step 4
        write_lines(tmp_path / "parent", [x for x in read_lines(tmp_path / "parent") if x["step"] <= 3])
    assert "step 4 of stage small; that workdir is gone." in report(tmp_path / "grown", draw=what == "gone").text


@pytest.mark.parametrize("text", ["{", "[]", '{"workdir": "x"}', '{"workdir": "x", "step": "4"}'])
def test_a_damaged_description_of_the_parent_is_refused(tmp_path, text):
    make_grown_run(tmp_path)
    (tmp_path / "grown" / "parent.json").write_text(text)
    with pytest.raises(ConfigError, match=r"parent\.json does not describe a parent run"):
        read_run(tmp_path / "grown")
