"""The picture of a run: losses, size, learning rate, gradient norm and speed; with teachers also judgements."""

import math
from collections.abc import Sequence
from pathlib import Path
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
SMOOTHED_FROM = 30  # lines of metrics; fewer points are a curve that needs no mean


def run_figure(run: RunRecord, columns: int) -> "Figure":
    """Eight panels in `columns` columns, two for a desk, one for a phone; two more panels if the run has teachers."""
    from matplotlib.figure import Figure  # without pyplot: no global state, and the canvas is Agg's

    teachers = has_teachers(run)
    rows = (10 if teachers else 8) // columns
    width, height = (6.3, 3.2) if columns == 2 else (4.4, 2.8)  # inches of a panel
    figure = Figure(figsize=(width * columns, height * rows), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    loss, compute, bits, parameters, rate, norm, speed, utilization, *of_teachers = figure.subplots(
        rows, columns
    ).flatten()
    letters, of_text = width * 72 / 5.5, " of text" if teachers else ""
    for panel, title, field in (
        (loss, f"Loss{of_text} (nats per token)", "tokens"),
        (compute, f"Loss{of_text} against compute", "flops"),
        (bits, "Bits per byte", "tokens"),
        (parameters, "Parameters", "tokens"),
        (norm, "Gradient norm", "tokens"),
        (speed, "Throughput (tokens per second)", "tokens"),
        (utilization, f"Model FLOPs utilisation{_peak_kind(run)}", "tokens"),
    ):
        frame(panel, title, field, run.last[field])
        _draw_stages(panel, run, field, letters)
    _draw_curve(loss, run, "tokens", "loss")
    _draw_curve(compute, run, "flops", "loss")
    _draw_curve(bits, run, "tokens", "bits_per_byte")
    if run.gzip is not None:
        bits.axhline(run.gzip, color=GREY, linestyle="--", linewidth=1.2, label="gzip -9 of the same text")
    _add_step_axis(loss, run)
    for panel, name in ((loss, "loss"), (bits, "bits_per_byte")):
        _draw_parent(panel, run, name)
    _draw_parameters(parameters, run)
    _draw_learning_rate(rate, run, letters)
    _draw_gradient_norm(norm, run)
    for panel, name in ((speed, "tokens_per_second"), (utilization, "model_flops_utilization")):
        x, y = series(run.train, "tokens", name)
        panel.plot(x, y, color=TRAIN, linewidth=1.4, marker="o" if len(x) == 1 else None, clip_on=False)
    utilization.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if value > 1 else f"{value:.0%}")
    for panel in (loss, compute, bits):
        panel.legend(loc="upper right", **LEGEND)
    for panel in (parameters, rate, speed, utilization):
        panel.set_ylim(bottom=0)
    if teachers:
        _draw_teachers(of_teachers, run, letters)
    return figure


def frame(panel: "Axes", title: str, field: str, end: float) -> None:
    """Draw the title and the axes of a panel.

    Args:
        field: of the metrics on the x axis, "tokens" or "flops".
        end: right end of the x axis.
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
    panel.set_xlim(0, end or 1)


def _draw_stages(panel: "Axes", run: RunRecord, field: str, letters: float) -> None:
    """Draw a tint and a name for each stage (slanted where it is narrow), and a line at each growth.

    Args:
        field: of the metrics on the x axis, "tokens" or "flops".
        letters: number of letters of stage names that fit over the panel.
    """
    end = panel.get_xlim()[1]
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


def _add_step_axis(panel: "Axes", run: RunRecord) -> None:
    """A second axis below that of tokens: round steps, which are not evenly spaced where batch sizes differ."""
    from matplotlib.ticker import MaxNLocator

    last = run.last["step"]
    ticks = [int(step) for step in MaxNLocator(8, integer=True).tick_values(0, last) if 0 <= step <= last]
    steps = panel.secondary_xaxis(-0.24)
    steps.set_ticks([run.tokens_after(step) for step in ticks], [f"{step:,}" for step in ticks])
    steps.set_xlabel("step", fontsize=9, color=INK)
    steps.tick_params(labelsize=8, colors=INK)
    steps.spines["bottom"].set_color(GREY)


def _draw_parent(panel: "Axes", run: RunRecord, y_field: str) -> None:
    """The parent's last losses, in grey before token 0: of as many tokens as the run has, or of all if it has fewer."""
    if run.parent is None or run.parent_run is None:
        return
    before = min(run.parent.tokens, run.last["tokens"])
    label = f"parent, {Path(run.parent.workdir).name}"
    for lines, style in ((train_lines(run.parent_run, y_field), "-"), (run.parent_run.validation, "o")):
        x, y = series(lines, "tokens", y_field)
        near = [(tokens - run.parent.tokens, loss) for tokens, loss in zip(x, y, strict=True)]
        near = [point for point in near if point[0] >= -before]
        if near:
            panel.plot(*zip(*near, strict=True), style, color=GREY, alpha=0.6, linewidth=1, markersize=3, label=label)
            label = "_nolegend_"
    panel.set_xlim(left=-before)
    panel.axvline(0, color=INK, linewidth=0.9, linestyle=":")


def _draw_parameters(panel: "Axes", run: RunRecord) -> None:
    edges = [record.before["tokens"] for record in run.stages] + [run.last["tokens"]]
    sizes = [record.parameters or math.nan for record in run.stages]
    panel.stairs(sizes, edges, baseline=None, color=TRAIN, linewidth=2)
    for start, size in zip(edges, sizes, strict=False):
        panel.annotate(short(size), (start, size), (3, -10), textcoords="offset points", fontsize=8, color=INK)


def _draw_learning_rate(panel: "Axes", run: RunRecord, letters: float) -> None:
    """The schedule's learning rates: a line as far as the run has come, pale dashes for the steps that remain."""
    x, rates = run.learning_rates
    done = sum(tokens <= run.last["tokens"] for tokens in x)
    frame(panel, "Learning rate", "tokens", x[-1])
    _draw_stages(panel, run, "tokens", letters)
    panel.plot(x[:done], rates[:done], color=TRAIN, linewidth=1.4, clip_on=False, label="schedule")
    if done < len(x):
        first = max(done - 1, 0)
        style: Record = {"color": TRAIN, "alpha": 0.45, "linestyle": "--", "linewidth": 1.2, "label": "not trained yet"}
        panel.plot(x[first:], rates[first:], **style)
        panel.legend(loc="upper right", **LEGEND)


def _peak_kind(run: RunRecord) -> str:
    """The end of the title of utilisation where the peak is not of a data sheet."""
    source = str(run.starts[-1].get("peak_source", "")) if run.starts else ""
    return " of a measured peak" if source.startswith("measured") else ""


def _draw_gradient_norm(panel: "Axes", run: RunRecord) -> None:
    """Gradient norms on a logarithmic axis, on which a single large one leaves the others readable."""
    x, y = series(run.train, "tokens", "gradient_norm")
    panel.plot(x, y, color=TRAIN, linewidth=1, marker="o" if len(x) == 1 else None, clip_on=False)
    if any(norm > 0 for norm in y):
        panel.set_yscale("log", subs=(2, 5))
    clip_norm = run.config.optimizer.clip_norm
    if clip_norm is not None:
        panel.axhline(clip_norm, color=GREY, linestyle="--", linewidth=1.2, label="larger norms are clipped to it")
        panel.legend(loc="upper right", **LEGEND)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}")
    panel.tick_params(which="minor", labelsize=8, colors=INK)


def _draw_teachers(panels: Sequence["Axes"], run: RunRecord, letters: float) -> None:
    """Draw the panels of the teachers' sequences: accuracy of the judgements, and the loss of the marks."""
    judgements, loss = panels
    titles = ("Judgement accuracy", "Loss of teachers (nats per token)")
    for panel, title in zip(panels, titles, strict=True):
        frame(panel, title, "tokens", run.last["tokens"])
        _draw_stages(panel, run, "tokens", letters)
    _draw_curve(judgements, run, "tokens", "judgement_accuracy")
    _draw_curve(loss, run, "tokens", "teacher_loss")
    judgements.axhline(CHANCE, color=GREY, linestyle="--", linewidth=1.2, label=f"chance ({CHANCE:.0%})")
    judgements.set_ylim(0, 1)
    judgements.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    judgements.legend(loc="lower right", **LEGEND)
    loss.legend(loc="upper right", **LEGEND)


def _draw_curve(panel: "Axes", run: RunRecord, x_field: str, y_field: str) -> None:
    x, y = series(train_lines(run, y_field), x_field, y_field)
    if len(x) >= SMOOTHED_FROM:
        panel.plot(x, y, color=TRAIN, alpha=0.35, linewidth=0.8, label="train")
        panel.plot(x, smoothed(y), color=TRAIN, linewidth=1.6, label="train, smoothed")
    elif x:
        panel.plot(x, y, color=TRAIN, linewidth=1.4, marker="." if len(x) == 1 else None, clip_on=False, label="train")
    x, y = series([line for line in run.validation if y_field in line], x_field, y_field)
    if x:
        panel.plot(x, y, "o-", color=VALIDATION, linewidth=1, markersize=4, clip_on=False, label="validation")


def series(lines: Sequence[Record], x: str, y: str) -> tuple[list[float], list[float]]:
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
    lines = (line for line in run.train if line.get("loss") is None or line.get(name) is not None)
    return [{**line, "loss": line.get("language_loss")} for line in lines]


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a twentieth of the curve on either side, at least 4 values; fewer near the ends, so without a lag.

    The loss of a batch scatters around the trend. A mean over 9 values has a third of their scatter, which the eye sees
    as a smooth line; a tenth of the curve, 4 to 20 times as many, still follows the fall of the loss. NaN stays a gap,
    and is never counted.
    """
    half = max(4, len(values) // 20)
    means = []
    for i, value in enumerate(values):
        reach = min(half, i, len(values) - 1 - i)
        window = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if math.isfinite(value) else math.nan)
    return means
