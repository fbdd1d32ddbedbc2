"""The report of invented runs: its numbers, counted by hand."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from report_runs import STAGES, change, make_teacher_workdir, make_workdir, read_lines, report, write_lines

from flmjax.config import to_stored
from flmjax.data.prepare import prepare
from flmjax.report.run_figure import run_figure
from flmjax.report.run_record import read_run


def test_the_table_of_stages_has_the_numbers_by_hand(tmp_path):
    make_workdir(tmp_path)
    change(tmp_path, "train", loss=1.5)
    change(tmp_path, "validation", loss=1.25, bits_per_byte=2.0)
    table = report(tmp_path).table(0)
    assert list(table) == ["small", "large"]
    common = {"layers": "1", "heads": "1", "batch": "2 x 16"}
    common |= {"train loss": "1.500", "val. loss": "1.250", "val. bits/byte": "2.000"}
    small = {"embed": "4", "MLP": "8", "parameters": "182", "steps": "4", "tokens": "128", "FLOPs": "129 kFLOP"}
    large = {"embed": "8", "MLP": "16", "parameters": "486", "steps": "2", "tokens": "64", "FLOPs": "166 kFLOP"}
    assert table["small"] == {"stage": "small", **common, **small}
    assert table["large"] == {"stage": "large", **common, **large}


def test_the_headline_has_the_numbers_by_hand(tmp_path):
    make_workdir(tmp_path)
    change(tmp_path, "validation", bits_per_byte=2.0)
    text = report(tmp_path).text
    assert "Final validation 2.000 bits per byte, 20.0% below gzip -9 of the same text (2.500)" in text
    assert "Tokens 192 step 6 of 6" in text
    assert "Model FLOPs 295 kFLOP" in text
    assert "Parameters 182 → 486 small → large" in text
    change(tmp_path, "validation", bits_per_byte=3.0)
    assert "Final validation 3.000 bits per byte, 20.0% above gzip" in report(tmp_path).text
    # 128 tokens at 64 a second, 64 tokens at 32 a second
    assert "Training time 4.0 s updates alone; growth: 1.5 s more" in text


def test_the_saving_is_a_cost_at_equal_tokens(tmp_path):
    make_workdir(tmp_path)
    text = report(tmp_path).text
    assert "Cost at equal tokens: 40.7% fewer model FLOPs (295 kFLOP spent, 498 kFLOP had the model of stage" in text
    assert "not a saving at equal loss" in text


def test_a_run_in_progress_counts_its_finished_steps(tmp_path):
    make_workdir(tmp_path, until=5)
    page = report(tmp_path, draw=True)
    assert "The run is not finished: 5 of 6 steps." in page.text
    assert "Latest validation" in page.text
    assert page.table(0)["large"]["steps"] == "1 of 2"
    assert page.table(0)["large"]["tokens"] == "32"


def test_a_stage_that_has_not_begun_is_not_listed(tmp_path):
    make_workdir(tmp_path, until=3)
    page = report(tmp_path)
    assert list(page.table(0)) == ["small"]
    assert not re.search("equal tokens|Certificates", page.text)


def test_a_run_killed_right_after_growth_is_reported(tmp_path):
    make_workdir(tmp_path)
    write_lines(tmp_path, [line for line in read_lines(tmp_path) if line["step"] <= 4])
    assert report(tmp_path, draw=True).table(0)["large"]["steps"] == "0 of 2"


def test_a_run_without_growth_has_no_certificates_and_no_saving(tmp_path):
    make_workdir(tmp_path, stages=STAGES[:1])
    page = report(tmp_path)
    assert "Parameters 182 small" in page.text
    assert not re.search("equal tokens|Certificates", page.text)


def test_a_single_line_of_metrics_is_enough(tmp_path):
    make_workdir(tmp_path)
    write_lines(tmp_path, [line for line in read_lines(tmp_path) if line["step"] == 1 and line["kind"] == "train"])
    page = report(tmp_path, draw=True)
    assert page.table(0)["small"]["val. loss"] == "-"


def test_losses_that_were_not_finite_and_skipped_updates_show(tmp_path):
    make_workdir(tmp_path)
    lines = read_lines(tmp_path)
    bad = {"loss": None, "bits_per_byte": None}
    write_lines(tmp_path, [{**x, **bad, "skipped_updates": x["step"] - 4} if x["step"] > 4 else x for x in lines])
    page = report(tmp_path, draw=True)
    assert "Skipped updates (gradient not finite): 2." in page.text
    assert page.table(0)["large"]["train loss"] == "-"


def test_lines_without_a_rate_take_their_stages_time_per_token(tmp_path):
    make_workdir(tmp_path)
    lines = read_lines(tmp_path)
    write_lines(tmp_path, [{**x, "tokens_per_second": None} if x["step"] in (1, 5) else x for x in lines])
    assert "Training time 4.0 s" in report(tmp_path).text


def test_a_missing_meta_json_is_reported(tmp_path):
    make_workdir(tmp_path)
    (tmp_path / "data" / "meta.json").unlink()
    page = report(tmp_path, draw=True)
    assert "The vocabulary's size is unknown" in page.text
    assert "gzip -9 of the same text: -" in page.text
    assert page.table(0)["small"]["parameters"] == "-"


def test_meta_json_is_read_from_the_configs_directory(tmp_path):
    config = make_workdir(tmp_path / "run")
    data = dataclasses.replace(config.data, sources=("a",), directory=str(tmp_path / "elsewhere"))
    prepared = prepare(data, tmp_path / "elsewhere", sources={"a": (f"document {i}" for i in range(100))})
    config = dataclasses.replace(config, data=data)
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_stored(config)))
    page = report(tmp_path / "run")
    assert page.table(0)["small"]["parameters"] == "1,170"  # 182 + (257 - 10) x 4
    assert f"gzip -9 of the same text ({prepared.validation_gzip_bits_per_byte:.3f})" in page.text


def test_metrics_of_a_longer_run_are_reported(tmp_path):
    """An interrupted run may go on with fewer steps: its lines past the new end stay until it does."""
    make_workdir(tmp_path)
    config = read_run(tmp_path).config
    shorter = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], steps=3),))
    (tmp_path / "config.json").write_text(json.dumps(to_stored(shorter)))
    lines = [line for line in read_lines(tmp_path) if line.get("stage") == "small" and line["kind"] != "growth"]
    write_lines(tmp_path, lines)
    assert report(tmp_path, draw=True).table(0)["small"]["steps"] == "3"


# ---- teachers -------------------------------------------------------------------------------------------------------


def test_teachers_have_their_columns_and_their_tile(tmp_path):
    make_teacher_workdir(tmp_path)
    change(tmp_path, "validation", judgement_accuracy=0.7314, teacher_loss=0.25)
    page = report(tmp_path)
    row = page.table(0)["large"]
    assert (row["val. teacher loss"], row["val. judgements"]) == ("0.250", "73.1% of 1,512")
    assert "Judgement accuracy 73.1% 1,512 held-out judgements; chance: 50%" in page.text
    lines = [line for line in read_lines(tmp_path) if line["kind"] == "train"]
    assert row["train loss"] == f"{lines[-1]['language_loss']:.3f}"  # that of text, as in validation


def test_validation_by_source_is_a_table(tmp_path):
    make_teacher_workdir(tmp_path)
    sources = {"loss/en": 1.5, "bits_per_byte/en": 0.75, "loss/zh": None, "bits_per_byte/zh": 2.5}
    change(tmp_path, "validation", **sources, **{"judgement_accuracy/isa": 0.875, "judgement_accuracy/cola": 0.5})
    page = report(tmp_path)
    head, *rows = page.tables[1]
    assert head == ["source", "stage", "val. loss", "val. bits/byte", "val. judgements"]
    assert rows[:4] == [
        ["en", "small", "1.500", "0.750", "-"],
        ["zh", "small", "-", "2.500", "-"],
        ["isa", "small", "-", "-", "87.5%"],
        ["cola", "small", "-", "-", "50.0%"],
    ]
    assert [row[1] for row in rows[4:]] == ["large"] * 4


def test_little_held_out_text_is_a_warning_of_the_page(tmp_path):
    make_workdir(tmp_path)
    path = tmp_path / "data" / "meta.json"
    few, enough = {"documents": 2, "tokens": 99}, {"documents": 20, "tokens": 999}
    sources = {"en": {"train": enough, "validation": enough}, "zh": {"train": enough, "validation": few}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "sources": sources}))
    text = report(tmp_path).text
    assert "Source 'zh': its validation loss is not reliable: the held-out text has 2 documents, fewer than 10" in text
    assert "Source 'en'" not in text


@pytest.mark.parametrize("alternating", [False, True])
def test_the_picture_shows_judgements_against_chance(tmp_path, alternating):
    make_teacher_workdir(tmp_path, alternating)
    for columns in (1, 2):
        panels = {panel.get_title(loc="left"): panel for panel in run_figure(read_run(tmp_path), columns).axes}
        assert len(panels) == 10
        judgements = panels["Judgement accuracy"]
        assert judgements.get_ylim() == (0, 1)
        chance = next(line for line in judgements.get_lines() if line.get_label() == "chance (50%)")
        assert list(chance.get_ydata()) == [0.5, 0.5]
        logged = read_lines(tmp_path)
        titles = {"Judgement accuracy": "judgement_accuracy", "Loss of teachers (nats per token)": "teacher_loss"}
        titles |= {"Loss of text (nats per token)": "loss", "Bits per byte": "bits_per_byte"}
        for title, name in titles.items():
            drawn = {line.get_label(): line.get_xydata().tolist() for line in panels[title].get_lines()}
            for kind, of_kind in (("train", {"loss": "language_loss"}.get(name, name)), ("validation", name)):
                lines = [line for line in logged if line["kind"] == kind and line[of_kind] is not None]
                assert drawn[kind] == [[line["tokens"], line[of_kind]] for line in lines]
                assert len(lines) == {"train": 3 if alternating else 6, "validation": 2}[kind]


def test_a_stage_that_ends_in_teachers_shows_its_loss_of_text(tmp_path):
    make_teacher_workdir(tmp_path, alternating=True)
    lines = read_lines(tmp_path)
    write_lines(tmp_path, [line for line in lines if (line["kind"], line["step"]) != ("train", 4)])
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert report(tmp_path).table(0)["small"]["train loss"] == f"{losses[2]:.3f}"


def test_updates_that_were_not_finite_are_gaps_with_teachers_too(tmp_path):
    make_teacher_workdir(tmp_path)
    bad = {"loss": None, "language_loss": None, "bits_per_byte": None, "teacher_loss": None}
    write_lines(tmp_path, [{**x, **bad} if x["step"] == 3 else x for x in read_lines(tmp_path)])
    panels = run_figure(read_run(tmp_path), columns=2).axes
    train = next(line for line in panels[0].get_lines() if line.get_label() == "train")
    assert [math.isnan(y) for y in train.get_ydata()] == [False, False, True, False, False, False]


def test_a_run_without_teachers_does_not_mention_them(tmp_path):
    make_workdir(tmp_path / "run")
    report(tmp_path / "run")
    source = (tmp_path / "run" / "report.html").read_text().split("<summary>config.json")[0]
    assert not re.search("(?i)judg|teacher|chance", source)
    panels = run_figure(read_run(tmp_path / "run"), columns=2).axes
    titles = ["Loss (nats per token)", "Loss against compute", "Bits per byte", "Parameters", "Learning rate"]
    titles += ["Gradient norm", "Throughput (tokens per second)", "Model FLOPs utilisation"]
    assert [panel.get_title(loc="left") for panel in panels] == titles


# ---- certificates ---------------------------------------------------------------------------------------------------


def certify(workdir: Path, **values: object) -> dict[str, str]:
    """Report with a changed certificate; returns its row."""
    path = workdir / "certificates" / "step_00000004.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return report(workdir).table(1)["small → large"]


def test_a_certificate_below_its_tolerance_passes(tmp_path):
    make_workdir(tmp_path)
    row = certify(tmp_path, loss_before=1.5, loss_after=1.50001)
    expected = {
        "step": "4",
        "result": "✓ exact",
        "float32": "1.2e-06",
        "float64": "3.1e-15",
        "tolerance (float32)": "1e-04",
    }
    expected |= {"run": "1.2e-06 (float32)", "max |logit|": "11.25", "loss": "1.5000", "family": "zero"}
    expected |= {"own rounding (run)": "1.3e-05", "rms (run)": "2.5e-07", "largest at (run)": "sequence 3, token 17"}
    expected |= {"KL": "2.5e-09", "gradient norm": "1.25 → 1.5"}
    expected |= {"compared": "4 sequences, 1,024 tokens", "sizes": "embed_dim 4 → 8, mlp_dim 8 → 16"}
    assert row == expected | {"growth": "small → large"}


def test_a_certificate_of_an_older_version_is_shown_with_dashes(tmp_path):
    make_workdir(tmp_path)
    row = certify(tmp_path, rms_difference=None, rounding=None, row=None, roundings=None)
    assert row["result"] == "✓ exact"
    assert [row[name] for name in ("own rounding (run)", "rms (run)", "largest at (run)")] == ["-", "-", "-"]


@pytest.mark.parametrize("difference", [2e-4, None, math.nan])
def test_a_certificate_above_its_tolerance_or_unmeasured_fails(tmp_path, difference):
    make_workdir(tmp_path)
    row = certify(tmp_path, max_difference={"run": 0.0, "float32": difference, "float64": 0.0})
    assert row["result"] == "✗ not shown exact"


def test_an_operator_that_is_not_exact_is_not_marked_as_passed(tmp_path):
    make_workdir(tmp_path)
    assert certify(tmp_path, exact=False, claim="not exact")["result"] == "not exact, by design"


@pytest.mark.parametrize("exact", [True, False])
def test_a_stored_failure_is_never_shown_as_passed(tmp_path, exact):
    """Its float32 difference may be within the tolerance: the divergence or the gradient failed."""
    make_workdir(tmp_path)
    assert certify(tmp_path, exact=exact, failure="is not exact: KL divergence in bfloat16")["result"] == "✗ failed"


def test_growth_without_a_certificate_is_marked(tmp_path):
    make_workdir(tmp_path)
    (tmp_path / "certificates" / "step_00000004.json").unlink()
    assert report(tmp_path).table(1)["small → large"]["result"] == "✗ no certificate"
