"""The report as a file: one page that needs no other, its pictures, and workdirs that it refuses."""

import base64
import dataclasses
import html
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from report_runs import (
    STAGES,
    change,
    make_workdir,
    read_lines,
    report,
    write_lines,
)

from flmjax.config import (
    FORMAT,
    ConfigError,
    OptimizerConfig,
    to_json,
)
from flmjax.optimizer.schedule import learning_rate
from flmjax.report.page import short
from flmjax.report.run_figure import run_figure, smoothed
from flmjax.report.run_page import write_report
from flmjax.report.run_record import read_run
from flmjax.workdir.paths import read_config


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
    for panel, x in zip(panels, [128, 129_024, *[128] * 6], strict=True):
        assert [x, x] in [line.get_xdata() for line in panel.get_lines()]
        assert {"small", "large"} <= {text.get_text() for text in panel.texts}
    assert 2.5 in [line.get_ydata()[0] for line in panels[2].get_lines()]


@pytest.mark.parametrize("points", [30, 80, 200])
def test_the_smoothed_curve_is_smoother_than_the_curve(tmp_path, points):
    """With 40 to 119 lines of metrics the "smoothed" curve was the curve itself: a mean over one value or three."""
    make_workdir(tmp_path, stages=(dataclasses.replace(STAGES[0], steps=points),))
    drawn = curves(run_figure(read_run(tmp_path), columns=2).axes[0])
    roughness = {name: np.abs(np.diff(drawn[name][:, 1], n=2)).mean() for name in ("train", "train, smoothed")}
    assert roughness["train, smoothed"] < roughness["train"] / 5
    middle = slice(points // 3, 2 * points // 3)  # the mean follows the curve
    means = [drawn[name][middle, 1].mean() for name in ("train", "train, smoothed")]
    assert means[1] == pytest.approx(means[0], rel=0.02)


def test_the_learning_rate_is_drawn_from_the_schedule_to_its_end(tmp_path):
    """Lines of metrics every 40 steps would cut the corner of a warm-up of 10."""
    settings = {"steps": 100, "learning_rate": 3e-3, "warmup_steps": 10, "final_learning_rate": 1e-4}
    stages = (dataclasses.replace(STAGES[0], **settings), dataclasses.replace(STAGES[1], steps=30, batch_size=4))
    make_workdir(tmp_path, stages=stages, until=80, log_every=40)
    drawn = curves(panels(tmp_path)["Learning rate"])
    x = [32 * step for step in range(1, 101)] + [3200 + 64 * step for step in range(1, 31)]  # tokens
    points = np.array([x, [learning_rate(stages, update) for update in range(130)]]).T
    np.testing.assert_array_equal(drawn["schedule"], points[:80])
    np.testing.assert_array_equal(drawn["not trained yet"], points[79:])
    assert drawn["schedule"][:, 1].max() == pytest.approx(3e-3)


def test_a_long_schedule_keeps_its_corners(tmp_path):
    stages = (dataclasses.replace(STAGES[0], steps=100_000, learning_rate=3e-3, warmup_steps=777),)
    make_workdir(tmp_path, stages=stages, until=20)
    x, rates = read_run(tmp_path).learning_rates
    assert len(x) < 400
    assert (x[-1], max(rates)) == (3_200_000, pytest.approx(3e-3))
    assert {32 * step for step in (1, 777, 778, 100_000)} <= set(x)


def test_the_axis_of_steps_fits_stages_of_unlike_batch_sizes(tmp_path):
    stages = (STAGES[0], dataclasses.replace(STAGES[1], batch_size=16))
    make_workdir(tmp_path, stages=stages)  # 4 steps of 32 tokens, 2 of 256
    run = read_run(tmp_path)
    panel = run_figure(run, columns=2).axes[0]
    steps = next(axis for axis in panel.child_axes if axis.get_xlabel() == "step")
    assert list(steps.get_xticks()) == [0, 32, 64, 96, 128, 384, 640]
    assert [label.get_text() for label in steps.get_xticklabels()] == ["0", "1", "2", "3", "4", "5", "6"]


def test_gradient_norm_and_utilisation_have_panels(tmp_path):
    make_workdir(tmp_path)
    lines = [line for line in read_lines(tmp_path) if line["kind"] == "train"]
    for title, name in {"Gradient norm": "gradient_norm", "Model FLOPs utilisation": "model_flops_utilization"}.items():
        curve = next(line for line in panels(tmp_path)[title].get_lines() if len(line.get_xdata()) == len(lines))
        assert curve.get_xydata().tolist() == [[line["tokens"], line[name]] for line in lines]


def panels(workdir):
    return {panel.get_title(loc="left"): panel for panel in run_figure(read_run(workdir), columns=2).axes}


def curves(panel):
    return {line.get_label(): line.get_xydata() for line in panel.get_lines()}


def test_the_smoothed_curve_is_a_mean_that_skips_gaps():
    values = [1.0, 2.0, 6.0, math.nan, 4.0, 0.0]
    assert smoothed(values) == pytest.approx([1.0, 3.0, 3.25, math.nan, 2.0, 0.0], nan_ok=True)


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
