"""A plan as files: plan.json for programs, plan.html for people."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flmjax.disk import writing
from flmjax.hardware import GiB
from flmjax.planning.plan import Plan
from flmjax.report.page import base64_text, png, render, short
from flmjax.report.plan_table import closing, growth_rows, stage_rows
from flmjax.text_table import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, STATE, TEMPORARY, LIMIT, AREA = "#22303c", "#1f6fb2", "#9cc4e4", "#c8412b", "#dbe9f6"


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write FOLDER/plan.json and FOLDER/plan.html, a page that needs no other file; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.html"
    with writing(path):
        (folder / "plan.json").write_text(json.dumps(plan.to_json(), indent=1, allow_nan=False))
        path.write_text(_plan_page(plan), encoding="utf-8")
    return path


def _plan_page(plan: Plan) -> str:
    return render(
        "plan.html.jinja",
        title=f"{plan.topology} - flmjax plan",
        topology=plan.topology,
        refusals=plan.refusals,
        boxes=_boxes(plan),
        wide=base64_text(png(plan_figure(plan, columns=2))),
        narrow=base64_text(png(plan_figure(plan, columns=1))),
        stages=stage_rows(plan),
        growths=growth_rows(plan) if plan.growths else [],
        closing=closing(plan),
    )


def _boxes(plan: Plan) -> list[tuple[str, str, str]]:
    """The page's first line: (label, value, note) of each box."""
    costs, total = [stage.cost for stage in plan.stages], plan.total
    fits = "no" if plan.refusals else "yes" if plan.is_exact else "unknown"
    price = "no price is known" if total.dollars is None else f"{figure(total.dollars)} dollars"
    tokens, flops = sum(stage.tokens for stage in costs), sum(stage.flops for stage in costs)
    boxes = [
        ("Fits", fits, f"{plan.devices} x {plan.chip.kind}"),
        ("Days", figure(total.days), "at estimated step times, no pauses"),
        ("Device-hours", figure(total.device_hours), price),
        ("Tokens", short(tokens), f"{flops / 1e21:.4g} zettaFLOPs"),
    ]
    if len(costs) > 1:
        boxes.append(("Saved at equal tokens", f"{plan.saved:.0%}", "of FLOPs, against the last model from scratch"))
    return boxes


def plan_figure(plan: Plan, columns: int) -> "Figure":
    """Two panels, memory and timeline, in `columns` columns: two for a desk, one for a phone."""
    from matplotlib.figure import Figure  # without pyplot: no global state

    width, height = (6.3, 3.4) if columns == 2 else (4.4, 3.0)
    figure = Figure(figsize=(width * columns, height * (2 // columns)), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    memory, timeline = figure.subplots(2 // columns, columns).flatten()
    _draw_memory(memory, plan)
    _draw_timeline(timeline, plan)
    for panel in (memory, timeline):
        panel.tick_params(labelsize=8, colors=INK)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_memory(panel: "Axes", plan: Plan) -> None:
    """A bar for every program in the order of the run: its arguments, and the memory beside them at its peak."""
    bars = []
    for index, stage in enumerate(plan.stages):
        if index:
            growth = plan.growths[index - 1]
            bars.append((f"growth into {growth.to_stage}", growth.program))
            bars.append((f"certificate of {growth.to_stage}", growth.certificate))
        bars.append((f"step of {stage.cost.name}", stage.program))
    labels = [label for label, _ in bars]
    arguments = [program.arguments / GiB for _, program in bars]
    beside = [max(program.peak - program.arguments, 0) / GiB for _, program in bars]
    panel.barh(labels, arguments, color=STATE, label="state before")
    panel.barh(labels, beside, left=arguments, color=TEMPORARY, label="new state, temporaries")
    panel.axvline(plan.usable / GiB, color=LIMIT, linestyle="--", linewidth=1.2, label="usable by programs")
    panel.axvline(plan.chip.memory / GiB, color=LIMIT, linewidth=1.2, label=f"memory of {plan.chip.kind}")
    panel.set_xlim(0, max(plan.chip.memory / GiB, *(program.peak / GiB for _, program in bars)) * 1.05)
    panel.invert_yaxis()
    panel.set_title("Memory of a device (GiB)", loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2, fontsize=7, labelcolor=INK, edgecolor="none")


def _draw_timeline(panel: "Axes", plan: Plan) -> None:
    """Parameters over tokens, like the paper's figure 1: the area is the cost, the rectangle the last model's alone."""
    costs = [stage.cost for stage in plan.stages]
    edges = [0.0]
    for stage in costs:
        edges.append(edges[-1] + stage.tokens)
    sizes = [float(stage.parameters) for stage in costs]
    panel.stairs(sizes, edges, fill=True, color=AREA)
    panel.stairs(sizes, edges, baseline=None, color=STATE, linewidth=2)
    panel.plot([0, edges[-1]], [sizes[-1]] * 2, color=INK, linestyle=":", linewidth=1, label="no growth")
    for start, stage in zip(edges, costs, strict=False):
        place = (
            {"ha": "right", "va": "top", "xytext": (-4, -4)}
            if start > edges[-1] / 2
            else {"ha": "left", "xytext": (2, 3)}
        )
        text = f"{stage.name}, {short(stage.parameters)}"
        panel.annotate(text, (start, stage.parameters), textcoords="offset points", fontsize=8, color=INK, **place)
    panel.set_ylim(0, sizes[-1] * 1.25)
    panel.set_xlim(0, edges[-1])
    panel.xaxis.set_major_formatter(lambda value, _: short(value))
    panel.yaxis.set_major_formatter(lambda value, _: short(value))
    panel.set_xlabel("tokens", fontsize=9, color=INK)
    panel.set_title("Parameters over tokens", loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.legend(loc="upper left", fontsize=7, labelcolor=INK, edgecolor="none")
