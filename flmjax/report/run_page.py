"""The report of a run: `write_report` turns a workdir into loss.png and report.html."""

import json
import math
from pathlib import Path

from flmjax.disk import writing
from flmjax.model.flops import FLOPS_CONVENTION
from flmjax.report.goodput import NEW, goodput_text
from flmjax.report.page import base64_text, finite, number, png, render, short
from flmjax.report.run_figure import CHANCE, TINTS, has_teachers, run_figure
from flmjax.report.run_record import RunRecord, latest, read_run
from flmjax.report.run_tables import (
    certificate_table,
    judgements,
    mixture_table,
    roll_back_table,
    stage_table,
    start_table,
    validation_table,
    wall_time_table,
)
from flmjax.text_table import duration
from flmjax.workdir.storage import resolved


def write_report(workdir: Path, output: Path | None = None) -> Path:
    """Write loss.png and report.html, a page that needs no other file, into the workdir; returns the page's path.

    A run in progress, without growth or with missing files is reported as far as it is known.

    Args:
        output: another folder for both files.

    Raises:
        ConfigError: naming config.json or metrics.jsonl if it is absent, empty or unreadable.
    """
    run = read_run(workdir)
    wide, narrow = png(run_figure(run, columns=2)), png(run_figure(run, columns=1))
    page, folder = run_page(run, resolved(workdir).name, wide, narrow), output or workdir
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    with writing(path):
        (folder / "loss.png").write_bytes(wide)
        path.write_text(page, encoding="utf-8")
    return path


def run_page(run: RunRecord, name: str, wide: bytes, narrow: bytes) -> str:
    """The HTML page of a run called `name`, with its picture as two PNGs, for a desk and for a phone."""
    of_teachers = ", judgement accuracy" if has_teachers(run) else ""
    return render(
        "report.html.jinja",
        title=f"{name} - flmjax report",
        name=name,
        boxes=_boxes(run),
        parent=_parent_text(run),
        warnings=_warnings(run),
        wide=base64_text(wide),
        narrow=base64_text(narrow),
        words=f"Loss, bits per byte{of_teachers}, parameters, learning rate, gradient norm and speed of the run",
        stages=stage_table(run),
        mixture=mixture_table(run),
        validation=validation_table(run),
        tints=TINTS,
        saving=_saving(run),
        flops_convention=FLOPS_CONVENTION,
        peak=_peak_text(run),
        wall_time=wall_time_table(run),
        goodput=goodput_text(run.starts),
        starts=start_table(run),
        certificates=certificate_table(run),
        roll_backs=roll_back_table(run),
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
    time = duration(run.training_seconds), f"updates alone; growth: {duration(growth)} more"
    if wall_time := sum(run.seconds.values()):
        time = duration(wall_time), f"{run.seconds.get(NEW, 0.0) / wall_time:.0%} of it new updates, see Wall time"
    boxes = [
        ("Final validation" if step >= total else "Latest validation", number(bits), against_gzip),
        ("Tokens", short(run.last["tokens"]), f"step {step:,} of {total:,}"),
        ("Model FLOPs", short(run.last["flops"], "FLOP"), "forward and backward, all stages"),
        ("Parameters", " → ".join(dict.fromkeys(sizes)), " → ".join(record.stage.name for record in run.stages)),
        ("Training time", *time),
    ]
    if has_teachers(run):
        accuracy, judged = judgements(latest(run.validation))
        boxes.insert(1, ("Judgement accuracy", accuracy, f"{judged} held-out judgements; chance: {CHANCE:.0%}"))
    return boxes


def _warnings(run: RunRecord) -> list[str]:
    """Lines that a reader must know before the numbers: skipped updates, missing files, steps to come."""
    warnings = []
    skipped = [line for line in run.train if line.get("skipped_updates")]  # each skipped update has its line
    spikes = sum(bool(line.get("spike")) for line in skipped)
    for count, reason in ((len(skipped) - spikes, "gradient not finite"), (spikes, "loss spike")):
        if count:
            warnings.append(f"Skipped updates ({reason}): {count}.")
    if run.stages[-1].parameters is None:
        warnings.append("The vocabulary's size is unknown (no meta.json): no parameters, no cost comparison.")
    warnings += [f"{line[0].upper()}{line[1:]}." for line in run.data_warnings]
    if run.last["step"] < run.config.total_steps:
        warnings.append(f"The run is not finished: {run.last['step']:,} of {run.config.total_steps:,} steps.")
    return warnings


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


def _parent_text(run: RunRecord) -> str | None:
    """The sentence that names the parent of a grown run."""
    if run.parent is None:
        return None
    curve = "that workdir is gone" if run.parent_run is None else "its loss is grey in the picture"
    return f"Grown from {run.parent.workdir}, step {run.parent.step:,} of stage {run.parent.stage}; {curve}."


def _peak_text(run: RunRecord) -> str | None:
    """The peak that the utilisation of the newest start refers to; None if it is not known."""
    start = run.starts[-1] if run.starts else {}
    if "peak_flops" not in start:
        return None
    peak = f"{short(finite(start['peak_flops']), 'FLOP')}/s a device"
    return f"Utilisation: model FLOP/s by a peak of {peak}, {start.get('peak_source')}."


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
