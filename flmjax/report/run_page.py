"""The report of a run: `write_report` turns a workdir into loss.png and report.html."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from flmjax.model.flops import FLOPS_CONVENTION
from flmjax.report.page import base64_text, duration, finite, number, png, render, short
from flmjax.report.run_figure import CHANCE, TINTS, has_teachers, run_figure, train_lines
from flmjax.report.run_record import RunRecord, latest, read_run
from flmjax.workdir.metrics import Record


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


class Table(NamedTuple):
    """Column heads, and rows of as many cells."""

    head: list[str]
    rows: list[list[str]]


def run_page(run: RunRecord, name: str, wide: bytes, narrow: bytes) -> str:
    """The HTML page of a run called `name`, with its picture as two PNGs, for a desk and for a phone."""
    judgements = ", judgement accuracy" if has_teachers(run) else ""
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
    if has_teachers(run):
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
    head += ",val. teacher loss,val. judgements" if has_teachers(run) else ""
    losses = train_lines(run, "loss")
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
        if has_teachers(run):
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
