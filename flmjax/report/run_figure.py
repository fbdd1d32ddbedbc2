"""The picture of a run: loss, bits per byte, parameters, learning rate and throughput, of teachers their judgements."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flmjax.report.page import finite, short
from flmjax.report.run_record import RunRecord
from flmjax.workdir.metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TINTS = ("#dbe9f6", "#fdebd0", "#dcefdc", "#f0e0f0", "#f7f0c4", "#daf0f0")  # of the stages, in turn
INK, TRAIN, VALIDATION, GREY = "#22303c", "#1f6fb2", "#c8412b", "#777777"
LEGEND: Record = {"fontsize": 8, "labelcolor": INK, "edgecolor": "none", "framealpha": 0.7}
CHANCE = 0.5  # accuracy of a guess: a proposition is true or false


def run_figure(run: RunRecord, columns: int) -> "Figure":
    """Six panels in `columns` columns, two for a desk, one for a phone; with teachers two more panels, of teachers."""
    from matplotlib.figure import Figure  # without pyplot: no global state, and the canvas is Agg's

    teachers = has_teachers(run)
    rows = (8 if teachers else 6) // columns
    width, height = (6.3, 3.2) if columns == 2 else (4.4, 2.8)  # inches of a panel
    figure = Figure(figsize=(width * columns, height * rows), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    loss, compute, bits, parameters, rate, speed, *of_teachers = figure.subplots(rows, columns).flatten()
    if teachers:
        _draw_teachers(of_teachers, run, letters=width * 72 / 5.5)
    of_text = " of text" if teachers else ""
    for panel, title, field in (
        (loss, f"Loss{of_text} (nats per token)", "tokens"),
        (compute, f"Loss{of_text} against compute", "flops"),
        (bits, "Bits per byte", "tokens"),
        (parameters, "Parameters", "tokens"),
        (rate, "Learning rate", "tokens"),
        (speed, "Throughput (tokens per second)", "tokens"),
    ):
        _frame(panel, run, title, field, letters=width * 72 / 5.5)
    _draw_curve(loss, run, "tokens", "loss")
    _draw_curve(compute, run, "flops", "loss")
    _draw_curve(bits, run, "tokens", "bits_per_byte")
    if run.gzip is not None:
        bits.axhline(run.gzip, color=GREY, linestyle="--", linewidth=1.2, label="gzip -9 of the same text")
    for panel in (loss, compute, bits):
        panel.legend(loc="upper right", **LEGEND)
    edges = [record.before["tokens"] for record in run.stages] + [run.last["tokens"]]
    sizes = [record.parameters or math.nan for record in run.stages]
    parameters.stairs(sizes, edges, baseline=None, color=TRAIN, linewidth=2)
    for start, size in zip(edges, sizes, strict=False):
        parameters.annotate(short(size), (start, size), (3, -10), textcoords="offset points", fontsize=8, color=INK)
    for panel, name in ((rate, "learning_rate"), (speed, "tokens_per_second")):
        x, y = _series(run.train, "tokens", name)
        panel.plot(x, y, color=TRAIN, linewidth=1.4, marker="o" if len(x) == 1 else None, clip_on=False)
    for panel in (parameters, rate, speed):
        panel.set_ylim(bottom=0)
    return figure


def _frame(panel: "Axes", run: RunRecord, title: str, field: str, letters: float) -> None:
    """Draw title, axes and stages: a tint and a name for each (slanted where it is narrow), a line at each growth.

    Args:
        field: of the metrics on the x axis, "tokens" or "flops".
        letters: number of letters of stage names that fit over the panel.
    """
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=22)
    panel.set_xlabel({"tokens": "tokens", "flops": "model FLOPs"}[field], fontsize=9, color=INK)
    panel.tick_params(labelsize=8, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="white", linewidth=0.8)
    panel.set_axisbelow(True)
    unit = "FLOP" if field == "flops" else ""
    panel.xaxis.set_major_formatter(lambda value, _: short(value, unit).removesuffix(unit).strip())
    panel.yaxis.set_major_formatter(lambda value, _: short(value))
    end = run.last[field] or 1
    panel.set_xlim(0, end)
    for i, record in enumerate(run.stages):
        name, start, stop = record.stage.name, record.before[field], record.last[field]
        panel.axvspan(start, stop, color=TINTS[i % len(TINTS)], linewidth=0, zorder=0)
        if i:
            panel.axvline(start, color=INK, linewidth=0.9, linestyle=":")
        place: Record = {"x": (start + stop) / 2, "ha": "center"}
        if (stop - start) / end * letters < len(name) + 1:
            place = {"x": start, "ha": "left", "rotation": 30, "rotation_mode": "anchor"}
        transform = panel.get_xaxis_transform()
        panel.text(y=1.02, s=name, transform=transform, fontsize=8, color=INK, parse_math=False, **place)


def _draw_teachers(panels: Sequence["Axes"], run: RunRecord, letters: float) -> None:
    """Draw the panels of the teachers' sequences: accuracy of the judgements, and the loss of the marks."""
    judgements, loss = panels
    _frame(judgements, run, "Judgement accuracy", "tokens", letters)
    _frame(loss, run, "Loss of teachers (nats per token)", "tokens", letters)
    _draw_curve(judgements, run, "tokens", "judgement_accuracy")
    _draw_curve(loss, run, "tokens", "teacher_loss")
    judgements.axhline(CHANCE, color=GREY, linestyle="--", linewidth=1.2, label=f"chance ({CHANCE:.0%})")
    judgements.set_ylim(0, 1)
    judgements.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    judgements.legend(loc="lower right", **LEGEND)
    loss.legend(loc="upper right", **LEGEND)


def _draw_curve(panel: "Axes", run: RunRecord, x_field: str, y_field: str) -> None:
    x, y = _series(train_lines(run, y_field), x_field, y_field)
    if len(x) > 40:
        panel.plot(x, y, color=TRAIN, alpha=0.35, linewidth=0.8, label="train")
        panel.plot(x, smoothed(y, len(y) // 60), color=TRAIN, linewidth=1.6, label="train, smoothed")
    elif x:
        panel.plot(x, y, color=TRAIN, linewidth=1.4, marker="." if len(x) == 1 else None, clip_on=False, label="train")
    x, y = _series(run.validation, x_field, y_field)
    if x:
        panel.plot(x, y, "o-", color=VALIDATION, linewidth=1, markersize=4, clip_on=False, label="validation")


def _series(lines: Sequence[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two fields of the lines; a missing value is NaN, a gap in the curve."""
    return [line[x] for line in lines], [finite(line.get(y)) for line in lines]


def has_teachers(run: RunRecord) -> bool:
    """Whether the run has lines of metrics with judgements of teachers' propositions."""
    return any("judgement_accuracy" in line for line in (*run.train, *run.validation))


def train_lines(run: RunRecord, y: str) -> list[Record]:
    """The train lines to read `y` from; with teachers "loss" is that of text, as in validation.

    Lines whose batch had no sequence of y's kind are left out: they are no gap in the curve, as a loss that is not
    finite is.
    """
    if not has_teachers(run):
        return run.train
    name = "language_loss" if y == "loss" else y
    lines = (line for line in run.train if line["loss"] is None or line[name] is not None)
    return [{**line, "loss": line["language_loss"]} for line in lines]


def smoothed(values: Sequence[float], half: int) -> list[float]:
    """Means over up to `half` values on either side, fewer near the ends: no lag. NaN stays a gap, never counted."""
    means = []
    for i, value in enumerate(values):
        reach = min(half, i, len(values) - 1 - i)
        window = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if math.isfinite(value) else math.nan)
    return means
