"""Runs compared on one page: `write_comparison` draws their losses together and lists where their settings differ."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flmjax.config import ConfigError
from flmjax.data.prepared import short_names
from flmjax.disk import writing
from flmjax.report.page import base64_text, number, png, render, short
from flmjax.report.run_figure import LEGEND, SMOOTHED_FROM, frame, series, smoothed, train_lines
from flmjax.report.run_record import RunRecord, latest, read_run
from flmjax.report.run_tables import Table
from flmjax.text_table import duration
from flmjax.workdir.storage import resolved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#1f6fb2", "#c8412b", "#2e8540", "#8e44ad", "#b7791f", "#0f8b8d", "#c2185b", "#5d4037")  # of runs, in turn
MAX_NAME = 60  # letters of the names of the runs in the page's file name
Runs = dict[str, RunRecord]  # by a short name of the workdir


def write_comparison(workdirs: Sequence[Path], output: Path) -> Path:
    """Write a page that compares the runs of two or more workdirs, which it only reads; returns the page's path.

    Args:
        workdirs: in the order of the colours.
        output: folder of the page, A-vs-B.html for runs called A and B.

    Raises:
        ConfigError: for a folder that is no run or stands there twice, naming it.
    """
    folders = [resolved(workdir) for workdir in workdirs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ConfigError(f"--workdir={workdirs[i]} is the folder of another --workdir; name each run once")
    records = [read_run(workdir, with_parent=False) for workdir in workdirs]
    runs = dict(zip(short_names([str(folder) for folder in folders]), records, strict=True))
    page = render(
        "comparison.html.jinja",
        title=f"{', '.join(runs)} - flmjax comparison",
        names=list(runs),
        warnings=_warnings(runs),
        wide=base64_text(png(comparison_figure(runs, columns=2))),
        narrow=base64_text(png(comparison_figure(runs, columns=1))),
        words="Loss and bits per byte of the runs over tokens and over model FLOPs",
        results=result_table(runs),
        differences=difference_table(runs),
    )
    output.mkdir(parents=True, exist_ok=True)
    name = "-vs-".join(runs)
    if len(name) > MAX_NAME:  # other runs may have names that begin alike
        name = f"{name[:MAX_NAME]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    path = output / f"{name}.html"
    with writing(path):
        path.write_text(page, encoding="utf-8")
    return path


def comparison_figure(runs: Runs, columns: int) -> "Figure":
    """Four panels: loss and bits per byte, over tokens and over model FLOPs; a colour for each run."""
    from matplotlib.figure import Figure  # without pyplot: no global state, and the canvas is Agg's

    width, height = (6.3, 3.6) if columns == 2 else (4.4, 3.2)  # inches of a panel
    figure = Figure(figsize=(width * columns, height * (4 // columns)), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    panels = iter(figure.subplots(4 // columns, columns).flatten())
    for field, title in (("loss", "Loss (nats per token)"), ("bits_per_byte", "Bits per byte")):
        for x_field in ("tokens", "flops"):
            panel = next(panels)
            frame(panel, title, x_field, max(run.last[x_field] for run in runs.values()))
            panel.grid(axis="y", color="#e1e6ea", linewidth=0.8)
            for i, (name, run) in enumerate(runs.items()):
                color = COLORS[i % len(COLORS)]
                x, y = series(train_lines(run, field), x_field, field)
                if len(y) >= SMOOTHED_FROM:
                    y = smoothed(y)
                panel.plot(x, y, color=color, linewidth=1.4, label=f"{name}, train")
                x, y = series(run.validation, x_field, field)
                panel.plot(x, y, "o", color=color, markersize=4, clip_on=False, label=f"{name}, validation")
            panel.legend(loc="upper right", **LEGEND)
    return figure


def result_table(runs: Runs) -> Table:
    """The newest numbers of every run."""
    head = "run,step,tokens,FLOPs,parameters,train loss,val. loss,val. bits/byte,gzip -9 bits/byte,wall time"
    rows = []
    for name, run in runs.items():
        validation, train = latest(run.validation), latest(train_lines(run, "loss"))
        row = [name, f"{run.last['step']:,} of {run.config.total_steps:,}", f"{run.last['tokens']:,}"]
        row += [short(run.last["flops"], "FLOP"), number(run.stages[-1].parameters, ",")]
        row += [number(x) for x in (train.get("loss"), validation.get("loss"), validation.get("bits_per_byte"))]
        seconds = sum(run.seconds.values())
        rows.append([*row, number(run.gzip), duration(seconds) if seconds else "-"])
    return Table(head.split(","), rows)


def difference_table(runs: Runs) -> Table:
    """The settings in which the runs differ; a run without a setting, of a further stage for example, has a dash."""
    settings = [dict(_settings(run.config_json)) for run in runs.values()]
    paths = dict.fromkeys(path for of_run in settings for path in of_run)
    rows = [[path, *(of_run.get(path, "-") for of_run in settings)] for path in paths]
    return Table(["setting", *runs], [row for row in rows if len(set(row[1:])) > 1])


def _settings(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of every setting of a config as JSON: ("stages[0].steps", "240")."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _settings(entry, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple) and any(isinstance(entry, dict) for entry in value):
        for i, entry in enumerate(value):
            yield from _settings(entry, f"{path}[{i}]")
    else:
        yield path, str(value)


def _warnings(runs: Runs) -> list[str]:
    """Lines that a reader must know before the numbers: which of them cannot be compared."""
    warnings = []
    if len({run.config.model.vocab_size for run in runs.values()}) > 1:
        warnings.append("The vocabularies differ: compare bits per byte, not losses per token.")
    if len({run.gzip for run in runs.values()}) > 1:
        warnings.append("The held-out texts differ: gzip -9 does not compress them alike, nor need a model.")
    return warnings
