"""The report of invented runs whose numbers are known by hand."""

import base64
import dataclasses
import html
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flmjax.config import (
    FORMAT,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    to_json,
    to_stored,
)
from flmjax.data.prepare import prepare
from flmjax.model.flops import flops_per_token
from flmjax.report.page import short
from flmjax.report.run_page import run_figure, run_page, smoothed, write_report
from flmjax.report.run_record import read_run
from flmjax.workdir.paths import read_config

MODEL = ModelConfig(num_layers=1, embed_dim=4, num_heads=1, head_dim=2, mlp_dim=8, max_length=16, vocab_multiple=1)
STAGES = (
    StageConfig(name="small", steps=4, batch_size=2),
    StageConfig(name="large", steps=2, batch_size=2, embed_dim=8, mlp_dim=16),
)
VOCAB = 10
# Parameters of small: embedding 10 x 4 = 40; in the layer Q, K, V 3 (4 x 2 + 2), output 2 x 4 + 4,
# MLP 4 x 8 + 8 + 8 x 4 + 4, two norms 2 x 8; final norm 8. 40 + 30 + 12 + 76 + 16 + 8 = 182.
# Large: 80 + 3 (8 x 2 + 2) + (2 x 8 + 8) + (8 x 16 + 16 + 16 x 8 + 8) + 32 + 16 = 80 + 54 + 24 + 280 + 48 = 486.
# FLOPs per token of small: 6 (32 + 64 + 40) + 6 x 1 x 2 x 16 = 816 + 192 = 1008; large: 6 (64 + 256 + 80) + 192 = 2592.
# Tokens: 4 x 2 x 16 = 128, then 64 more: 192. FLOPs: 128 x 1008 = 129,024; + 64 x 2592 = 165,888: 294,912.
# All on large: 192 x 2592 = 497,664; 294,912 / 497,664 = 0.5926: 40.7 % fewer.


def make_workdir(
    workdir: Path,
    model: ModelConfig = MODEL,
    stages: tuple[StageConfig, ...] = STAGES,
    vocab_size: int = VOCAB,
    until: int | None = None,
    log_every: int = 1,
    tokens_per_second: float = 64.0,
) -> RunConfig:
    """Write the workdir of a run up to step `until`; losses fall from ln(vocab) by a power law."""
    config = RunConfig(model=model, stages=stages, data=DataConfig(vocabulary="bytes"))
    (workdir / "data").mkdir(parents=True)
    (workdir / "certificates").mkdir()
    (workdir / "config.json").write_text(json.dumps(to_stored(config)))
    meta = {"tokenizer": {"vocab_size": vocab_size}, "validation_gzip_bits_per_byte": 2.5}
    (workdir / "data" / "meta.json").write_text(json.dumps(meta))
    noise, lines, step, tokens, flops, loss = random.Random(0), [], 0, 0, 0.0, math.log(vocab_size)
    known = dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=vocab_size))
    for stage in known.schedule:
        settings, previous = stage.config, stage.previous
        if previous is not None and (until is None or step < until):
            growth = {"stage": stage.name, "from_stage": previous.name, "tokens": tokens, "flops": flops}
            lines.append({"kind": "growth", "step": step, **growth, "seconds": 1.5})
            certificate = make_certificate(step, previous.name, stage.name, previous.model, stage.model, loss)
            (workdir / "certificates" / f"step_{step:08d}.json").write_text(json.dumps(certificate))
        for s in range(settings.steps):
            if step == until:
                break
            step += 1
            tokens += settings.batch_size * model.max_length
            flops += settings.batch_size * model.max_length * flops_per_token(stage.model, model.max_length)
            loss = 0.3 * math.log(vocab_size) * (1 + (1 + step / 8) ** -0.35 * 2.3 * (1 - 0.08 * stage.index))
            cosine = 0.55 + 0.45 * math.cos(math.pi * s / settings.steps)
            common = {"stage": stage.name, "tokens": tokens, "flops": flops}
            if step % log_every == 0:
                train = loss + noise.gauss(0, 0.06)
                values = {"loss": train, "bits_per_byte": train / 2.1, "gradient_norm": 0.8}
                values["learning_rate"] = settings.learning_rate * min(1, (s + 1) / 20) * cosine
                speed = {"tokens_per_second": tokens_per_second / (stage.index + 1), "model_flops_utilization": 0.3}
                lines.append({"kind": "train", "step": step, **common, **values, **speed, "skipped_updates": 0})
            if s + 1 == settings.steps or step % (10 * log_every) == 0:
                lines.append({"kind": "validation", "step": step, **common, "loss": loss, "bits_per_byte": loss / 2.1})
        text = "The <b>bold</b> claim & a \x00 byte\nof stage " + stage.name
        lines.append({"kind": "sample", "step": step, "stage": stage.name, "prompt": "The ", "text": text})
        if step == until:
            break
    write_lines(workdir, lines)
    return config


def make_certificate(step: int, old: str, new: str, small: ModelConfig, large: ModelConfig, loss: float) -> dict:
    sizes = {f: [getattr(small, f), getattr(large, f)] for f in ("num_layers", "embed_dim", "mlp_dim", "num_heads")}
    sizes = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    certificate = {"step": step, "from_stage": old, "to_stage": new, "family": "zero", "exact": True, "sizes": sizes}
    certificate |= {"max_difference": {"run": 1.2e-06, "float32": 1.2e-06, "float64": 3.1e-15}, "max_logit": 11.25}
    certificate |= {"run_dtype": "float32", "loss_before": loss, "loss_after": loss, "rows": 4, "tokens": 1024}
    certificate |= {"kl": 2.5e-9, "gradient_norm": [1.25, 1.5], "claim": "exact", "mask_removed": None}
    return {**certificate, "parameters": [182, 486], "tolerance": 1e-4}


def write_lines(workdir: Path, lines: list[dict]) -> None:
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """The page's tables as {first cell: {column: cell}}, its text, the addresses it refers to and its open tags."""

    VOID = ("meta", "img", "source")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.words.append(" ")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.words.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.words.append(data)

    def table(self, i: int) -> dict[str, dict[str, str]]:
        head, *rows = self.tables[i]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def report(workdir: Path, draw: bool = False) -> Page:
    """The page, without its pictures unless `draw`: each costs a second."""
    if draw:
        return Page(write_report(workdir))
    page = workdir / "report.html"
    page.write_text(run_page(read_run(workdir), workdir.name, b"", b""), encoding="utf-8")
    return Page(page)


def change(workdir: Path, kind: str, **values: object) -> None:
    write_lines(workdir, [{**line, **(values if line["kind"] == kind else {})} for line in read_lines(workdir)])


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


# ---- teachers -------------------------------------------------------------------------------------------------------


def make_teacher_workdir(workdir: Path, alternating: bool = False, **kwargs: object) -> None:
    """make_workdir with teachers: the loss of the marks falls, the accuracy of judgements rises from chance.

    Where batches alternate, an odd step has teachers alone and an even one text alone.
    """
    make_workdir(workdir, **kwargs)
    lines, noise = read_lines(workdir), random.Random(1)
    last = max(line["step"] for line in lines)
    for line in lines:
        if line["kind"] not in ("train", "validation"):
            continue
        right = 0.5 + 0.4 * (1 - math.exp(-4 * line["step"] / last))
        spread = 0.04 if line["kind"] == "train" else 0.01
        line["judgement_accuracy"] = min(1.0, right + noise.gauss(0, spread))
        line["teacher_loss"] = 1.2 * (1 - right) + noise.gauss(0, spread / 4)
        if line["kind"] == "validation":
            line["judged"] = 1512
            continue
        line["language_loss"], line["loss"] = line["loss"], 0.8 * line["loss"] + 0.2 * line["teacher_loss"]
        if alternating and line["step"] % 2:
            line |= {"loss": line["teacher_loss"], "language_loss": None, "bits_per_byte": None}
        elif alternating:
            line |= {"loss": line["language_loss"], "teacher_loss": None, "judgement_accuracy": None}
    write_lines(workdir, lines)


def test_teachers_have_their_columns_and_their_tile(tmp_path):
    make_teacher_workdir(tmp_path)
    change(tmp_path, "validation", judgement_accuracy=0.7314, teacher_loss=0.25)
    page = report(tmp_path)
    row = page.table(0)["large"]
    assert (row["val. teacher loss"], row["val. judgements"]) == ("0.250", "73.1% of 1,512")
    assert "Judgement accuracy 73.1% 1,512 held-out judgements; chance: 50%" in page.text
    lines = [line for line in read_lines(tmp_path) if line["kind"] == "train"]
    assert row["train loss"] == f"{lines[-1]['language_loss']:.3f}"  # that of text, as in validation


@pytest.mark.parametrize("alternating", [False, True])
def test_the_picture_shows_judgements_against_chance(tmp_path, alternating):
    make_teacher_workdir(tmp_path, alternating)
    for columns in (1, 2):
        panels = {panel.get_title(loc="left"): panel for panel in run_figure(read_run(tmp_path), columns).axes}
        assert len(panels) == 8
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
    assert [panel.get_title(loc="left") for panel in panels] == [*titles, "Throughput (tokens per second)"]


# ---- certificates ---------------------------------------------------------------------------------------------------


def certify(workdir: Path, **values: object) -> dict[str, str]:
    """Report with a changed certificate; returns its row."""
    path = workdir / "certificates" / "step_00000004.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return report(workdir).table(1)["small → large"]


def test_a_certificate_below_its_tolerance_passes(tmp_path):
    make_workdir(tmp_path)
    row = certify(tmp_path, loss_before=1.5, loss_after=1.50001)
    expected = {"step": "4", "result": "✓ exact", "float32": "1.2e-06", "float64": "3.1e-15", "tolerance": "1e-04"}
    expected |= {"run": "1.2e-06 (float32)", "max |logit|": "11.25", "loss": "1.5000 → 1.5000", "family": "zero"}
    expected |= {"KL": "2.5e-09", "gradient norm": "1.25 → 1.5"}
    expected |= {"compared": "4 sequences, 1,024 tokens", "sizes": "embed_dim 4 → 8, mlp_dim 8 → 16"}
    assert row == expected | {"growth": "small → large"}


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


# ---- the page as a file ---------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_closes_its_tags(tmp_path):
    make_workdir(tmp_path)
    page = report(tmp_path, draw=True)
    assert page.open == []  # Page checks the order
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"] * 2
    assert base64.b64decode(page.addresses[1].split(",")[1]) == (tmp_path / "loss.png").read_bytes()
    source = re.sub(r"base64,[^\"]*", "", (tmp_path / "report.html").read_text())
    assert not re.search(r"https?:|//|url\(|@import|<script", source)


def test_text_is_escaped_and_unprintable_bytes_are_replaced(tmp_path):
    stages = (dataclasses.replace(STAGES[0], name="<i>$^$ & co"), STAGES[1])
    make_workdir(tmp_path, stages=stages)
    page = report(tmp_path, draw=True)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("<i>|\x00", source)
    text = html.escape("The <b>bold</b> claim & a \ufffd byte\nof stage large")  # all of it: it goes on from the prompt
    assert f"<pre><b>The </b>{text}</pre>" in source
    assert "<i>$^$ & co" in page.table(0)


def test_the_config_is_on_the_page(tmp_path):
    config = make_workdir(tmp_path)
    report(tmp_path)
    shown = re.search(r"<summary>config.json</summary><pre>(.*?)</pre>", (tmp_path / "report.html").read_text(), re.S)
    assert json.loads(html.unescape(shown.group(1))) == json.loads(json.dumps(to_json(config)))


def test_the_picture_shows_the_logged_numbers_and_marks_growth(tmp_path):
    make_workdir(tmp_path)
    panels = run_figure(read_run(tmp_path), columns=2).axes
    lines = read_lines(tmp_path)
    logged = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "validation")}
    axes = (("tokens", "loss"), ("flops", "loss"), ("tokens", "bits_per_byte"))
    for panel, (x, y) in zip(panels[:3], axes, strict=True):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
        for kind, of_kind in logged.items():
            assert drawn[kind] == [[line[x], line[y]] for line in of_kind]
    for panel, x in zip(panels, [128, 129_024, 128, 128, 128, 128], strict=True):
        assert [x, x] in [line.get_xdata() for line in panel.get_lines()]
        assert {"small", "large"} <= {text.get_text() for text in panel.texts}
    assert 2.5 in [line.get_ydata()[0] for line in panels[2].get_lines()]


def test_the_smoothed_curve_is_a_mean_that_skips_gaps():
    values = [1.0, 2.0, 6.0, math.nan, 4.0, 0.0]
    assert smoothed(values, half=1) == pytest.approx([1.0, 3.0, 4.0, math.nan, 2.0, 0.0], nan_ok=True)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (999.4, "", "999"),
        (999_600, "", "1 M"),
        (1_234_567, "", "1.23 M"),
        (101e9, "", "101 B"),
        (2e9, "FLOP", "2 GFLOP"),
        (52.76e21, "FLOP", "52.8 ZFLOP"),
    ],
)
def test_large_numbers_are_shortened(value, unit, text):
    assert short(value, unit) == text


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "why"), [("config.json", "does not exist"), ("metrics.jsonl", "is absent or empty")])
def test_a_workdir_without_its_files_is_refused_by_name(tmp_path, name, why):
    make_workdir(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=f"{re.escape(name)} {why}"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_config_is_named(tmp_path):
    make_workdir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize(("number", "named"), [(1, 1), (99, 99), (None, 1)])
def test_another_format_is_refused_with_both_numbers(tmp_path, number, named):
    """A config.json without a number is older than the numbers."""
    make_workdir(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text()) | {"format": number}
    (tmp_path / "config.json").write_text(json.dumps({k: x for k, x in stored.items() if x is not None}))
    with pytest.raises(ConfigError, match=rf"config\.json has format {named}; flmjax .* reads format {FORMAT}"):
        write_report(tmp_path)


def test_a_field_that_a_stored_config_lacks_has_its_default(tmp_path):
    make_workdir(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["config"]["optimizer"], stored["config"]["model"]["dropout"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path) == dataclasses.replace(read_config(tmp_path), optimizer=OptimizerConfig())
    write_report(tmp_path)


def test_metrics_of_another_config_are_refused(tmp_path):
    make_workdir(tmp_path)
    change(tmp_path, "train", stage="other")
    write_lines(tmp_path, [line for line in read_lines(tmp_path) if line["kind"] == "train"])
    with pytest.raises(ConfigError, match="names no stage"):
        write_report(tmp_path)


def test_importing_the_report_does_not_import_matplotlib():
    program = "import sys, flmjax.report.run_page; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
