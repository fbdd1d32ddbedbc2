"""The report of a run: `write_report` turns a workdir into loss.png and report.html."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flmjax.model.flops import FLOPS_CONVENTION
from flmjax.report.page import base64_text, duration, finite, number, png, render, short
from flmjax.report.run_record import RunRecord, latest, read_run
from flmjax.workdir.metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_report(workdir: Path) -> Path:
    """Write WORKDIR/loss.png and WORKDIR/report.html, a page that needs no other file; returns the page's path.

    A run in progress, without growth or with missing files is reported as far as it is known.

    Raises:
        ConfigError: naming config.json or metrics.jsonl if it is absent, empty or unreadable.
    """
    run = read_run(workdir)
    wide, narrow = png(run_figure(run, columns=2)), png(run_figure(run, columns=1))
    (workdir / "loss.png").write_bytes(wide)
    path = workdir / "report.html"
    path.write_text(run_page(run, workdir.resolve().name, wide, narrow), encoding="utf-8")
    return path


# ---- picture --------------------------------------------------------------------------------------------------------

TINTS = ("#dbe9f6", "#fdebd0", "#dcefdc", "#f0e0f0", "#f7f0c4", "#daf0f0")  # of the stages, in turn
INK, TRAIN, VALIDATION, GREY = "#22303c", "#1f6fb2", "#c8412b", "#777777"
LEGEND: Record = {"fontsize": 8, "labelcolor": INK, "edgecolor": "none", "framealpha": 0.7}
CHANCE = 0.5  # accuracy of a guess: a proposition is true or false


def run_figure(run: RunRecord, columns: int) -> "Figure":
    """Six panels in `columns` columns, two for a desk, one for a phone; with teachers two more panels, of teachers."""
    from matplotlib.figure import Figure  # without pyplot: no global state, and the canvas is Agg's

    teachers = _has_teachers(run)
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
    x, y = _series(_train_lines(run, y_field), x_field, y_field)
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


def _has_teachers(run: RunRecord) -> bool:
    return any("judgement_accuracy" in line for line in (*run.train, *run.validation))


def _train_lines(run: RunRecord, y: str) -> list[Record]:
    """The train lines to read `y` from; with teachers "loss" is that of text, as in validation.

    Lines whose batch had no sequence of y's kind are left out: they are no gap in the curve, as a loss that is not
    finite is.
    """
    if not _has_teachers(run):
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


# ---- page -----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Column heads, and rows of as many cells."""

    head: list[str]
    rows: list[list[str]]


def run_page(run: RunRecord, name: str, wide: bytes, narrow: bytes) -> str:
    """The HTML page of a run called `name`, with its picture as two PNGs, for a desk and for a phone."""
    judgements = ", judgement accuracy" if _has_teachers(run) else ""
    return render(
        "report.html.jinja",
        title=f"{name} - flmjax report",
        name=name,
        boxes=_boxes(run),
        warnings=_warnings(run),
        wide=base64_text(wide),
        narrow=base64_text(narrow),
        words=f"Loss, bits per byte{judgements}, parameters, learning rate and throughput of the run",
        stages=_stage_table(run),
        sources=_source_table(run),
        tints=TINTS,
        saving=_saving(run),
        flops_convention=FLOPS_CONVENTION,
        certificates=_certificate_table(run),
        samples=_samples(run),
        config=json.dumps(run.config_json, indent=2, ensure_ascii=False),
    )


def _boxes(run: RunRecord) -> list[tuple[str, str, str]]:
    """The page's first line: (label, value, note) of each box."""
    step, total = run.last["step"], run.config.total_steps
    bits = finite(latest(run.validation).get("bits_per_byte"))
    against_gzip = f"bits per byte; gzip -9 of the same text: {number(run.gzip)}"
    if run.gzip is not None and math.isfinite(bits):
        share = bits / run.gzip - 1
        relation = f"{abs(share):.1%} {'below' if share < 0 else 'above'}"
        against_gzip = f"bits per byte, {relation} gzip -9 of the same text ({run.gzip:.3f})"
    first, newest = run.stages[0], run.stages[-1]
    sizes = [short(record.parameters or math.nan) for record in (first, newest)]
    growth = sum(line.get("seconds") or 0.0 for line in run.growth)
    boxes = [
        ("Final validation" if step >= total else "Latest validation", number(bits), against_gzip),
        ("Tokens", short(run.last["tokens"]), f"step {step:,} of {total:,}"),
        ("Model FLOPs", short(run.last["flops"], "FLOP"), "forward and backward, all stages"),
        ("Parameters", " → ".join(dict.fromkeys(sizes)), " → ".join(record.stage.name for record in run.stages)),
        ("Training time", duration(run.training_seconds), f"updates alone; growth: {duration(growth)} more"),
    ]
    if _has_teachers(run):
        accuracy, judged = _judgements(latest(run.validation))
        boxes.insert(1, ("Judgement accuracy", accuracy, f"{judged} held-out judgements; chance: {CHANCE:.0%}"))
    return boxes


def _judgements(validation: Record) -> tuple[str, str]:
    """(accuracy, number) of the judgements of a line of validation."""
    return number(validation.get("judgement_accuracy"), ".1%"), number(validation.get("judged"), ",")


def _warnings(run: RunRecord) -> list[str]:
    """Lines that a reader must know before the numbers: skipped updates, missing files, steps to come."""
    warnings = []
    skipped = sum(bool(line.get("skipped_updates")) for line in run.train)  # each skipped update has its line
    if skipped:
        warnings.append(f"Skipped updates (gradient not finite): {skipped}.")
    if run.stages[-1].parameters is None:
        warnings.append("The vocabulary's size is unknown (no meta.json): no parameters, no cost comparison.")
    warnings += [f"{line[0].upper()}{line[1:]}." for line in run.data_warnings]
    if run.last["step"] < run.config.total_steps:
        warnings.append(f"The run is not finished: {run.last['step']:,} of {run.config.total_steps:,} steps.")
    return warnings


def _stage_table(run: RunRecord) -> Table:
    head = "stage,layers,embed,heads,MLP,parameters,steps,batch,tokens,FLOPs,train loss,val. loss,val. bits/byte"
    head += ",val. teacher loss,val. judgements" if _has_teachers(run) else ""
    losses = _train_lines(run, "loss")
    rows = []
    for record in run.stages:
        stage, model = record.stage, record.stage.model
        train = latest([line for line in losses if line["stage"] == stage.name])
        steps, tokens, flops = (record.last[key] - record.before[key] for key in ("step", "tokens", "flops"))
        row = [stage.name, *(str(size) for size in (model.num_layers, model.embed_dim, model.num_heads, model.mlp_dim))]
        row[3] += f" ({model.kv_heads} kv)" if model.kv_heads != model.num_heads else ""
        row += [
            number(record.parameters, ","),
            f"{steps:,}" + (f" of {stage.config.steps:,}" if steps < stage.config.steps else ""),
        ]
        row += [f"{stage.config.batch_size} x {model.max_length}", f"{tokens:,}", short(flops, "FLOP")]
        row += [number(x) for x in (train.get("loss"), *map(record.validation.get, ("loss", "bits_per_byte")))]
        if _has_teachers(run):
            accuracy, judged = _judgements(record.validation)
            row += [number(record.validation.get("teacher_loss")), f"{accuracy} of {judged}"]
        rows.append(row)
    return Table(head.split(","), rows)


def _source_table(run: RunRecord) -> Table:
    """The last validation of every stage by source, and by teacher; empty for a run with one of either kind."""
    metrics = ("loss", "bits_per_byte", "judgement_accuracy")
    rows = []
    for record in run.stages:
        labels = dict.fromkeys(key.split("/", 1)[1] for key in record.validation if "/" in key)
        for label in labels:
            loss, bits, accuracy = (record.validation.get(f"{metric}/{label}") for metric in metrics)
            rows.append([label, record.stage.name, number(loss), number(bits), number(accuracy, ".1%")])
    return Table(["source", "stage", "val. loss", "val. bits/byte", "val. judgements"], rows)


def _saving(run: RunRecord) -> dict[str, str] | None:
    """The cost at equal tokens, which follows from the schedule; no single run shows a saving at equal loss."""
    scratch = run.flops_without_growth
    if scratch is None:
        return None
    return {
        "share": f"{1 - run.last['flops'] / scratch:.1%}",
        "spent": short(run.last["flops"], "FLOP"),
        "scratch": short(scratch, "FLOP"),
        "stage": run.stages[-1].stage.name,
        "tokens": f"{run.last['tokens']:,}",
    }


def _certificate_table(run: RunRecord) -> Table:
    """The certificates, and a row for each growth that lacks one."""
    head = "growth,step,result,float32,float64,run,tolerance,max |logit|,loss,KL,gradient norm,compared,family,sizes"
    rows = [_certificate_row(certificate) for certificate in run.certificates]
    certified = {certificate.get("step") for certificate in run.certificates}
    for line in run.growth:
        if line["step"] not in certified:
            change = f"{line.get('from_stage')} → {line['stage']}"
            rows.append([change, f"{line['step']}", "✗ no certificate", *["-"] * 11])
    return Table(head.split(","), rows)


def _certificate_row(c: Record) -> list[str]:
    difference = c.get("max_difference") or {}
    norms = c.get("gradient_norm") or (None, None)
    return [
        f"{c.get('from_stage')} → {c.get('to_stage')}",
        f"{c.get('step')}",
        _verdict(c),
        number(difference.get("float32"), ".1e"),
        number(difference.get("float64"), ".1e"),
        f"{number(difference.get('run'), '.1e')} ({c.get('run_dtype')})",
        number(c.get("tolerance"), ".0e"),
        number(c.get("max_logit"), ".2f"),
        f"{number(c.get('loss_before'), '.4f')} → {number(c.get('loss_after'), '.4f')}",
        number(c.get("kl"), ".1e"),
        " → ".join(number(norm, ".3g") for norm in norms),
        f"{c.get('rows')} sequences, {number(c.get('tokens'), ',')} tokens",
        f"{c.get('family')}",
        ", ".join(f"{name} {a} → {b}" for name, (a, b) in (c.get("sizes") or {}).items()),
    ]


def _verdict(certificate: Record) -> str:
    if certificate.get("failure"):
        return "✗ failed"
    if not certificate.get("exact"):
        return f"{certificate.get('claim') or 'not exact'}, by design"
    difference, tolerance = (certificate.get("max_difference") or {}).get("float32"), certificate.get("tolerance")
    return "✓ exact" if finite(difference) <= finite(tolerance) else "✗ not shown exact"  # NaN is not <= anything


def _samples(run: RunRecord) -> list[dict[str, str]]:
    """The last sample of every stage."""
    last = {line["stage"]: line for line in run.sample}
    return [
        {
            "stage": stage,
            "step": f"{line['step']:,}",
            "prompt": line.get("prompt") or "",
            "text": line.get("text") or "",
        }
        for stage, line in last.items()
    ]
