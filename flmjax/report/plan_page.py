"""A plan as files: plan.json for programs, plan.html for people."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flmjax.hardware import GiB
from flmjax.planning.plan import Plan
from flmjax.report.page import base64_text, png, render, short
from flmjax.report.plan_table import closing, growth_rows, stage_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, STATE, TEMPORARY, LIMIT, AREA = "#22303c", "#1f6fb2", "#9cc4e4", "#c8412b", "#dbe9f6"


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write FOLDER/plan.json and FOLDER/plan.html, a page that needs no other file; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan.to_json(), indent=1))
    path = folder / "plan.html"
    path.write_text(_page(plan), encoding="utf-8")
    return path


def _page(plan: Plan) -> str:
    costs = [stage.cost for stage in plan.stages]
    total = plan.total
    price = "no price given" if total.dollars is None else f"{total.dollars:,.0f} dollars"
    boxes = [
        (
            "Fits",
            "no" if plan.refusals else "yes" if plan.is_exact else "unknown",
            f"{plan.devices} x {plan.chip.kind}",
        ),
        ("Days", f"{total.days:.1f}", "at the estimated step times, no pauses"),
        ("Device-hours", f"{total.device_hours:,.0f}", price),
        ("Tokens", short(sum(own.tokens for own in costs)), f"{sum(own.flops for own in costs) / 1e21:.4g} zettaFLOPs"),
    ]
    if len(plan.stages) > 1:
        boxes.append(("Saved at equal tokens", f"{plan.saved:.0%}", "of FLOPs, against the last model from scratch"))
    names = [own.name for own in costs]
    growths = [f"{growth.from_stage} → {growth.to_stage}" for growth in plan.growths]
    return render(
        "plan.html.jinja",
        title=f"{plan.topology} - flmjax plan",
        topology=plan.topology,
        refusals=plan.refusals,
        boxes=boxes,
        wide=base64_text(png(plan_figure(plan, columns=2))),
        narrow=base64_text(png(plan_figure(plan, columns=1))),
        stages=[["", *names], *([label, *cells] for label, cells in stage_rows(plan))],
        growths=[["", *growths], *([label, *cells] for label, cells in growth_rows(plan))] if growths else [],
        closing=closing(plan),
    )


def plan_figure(plan: Plan, columns: int) -> "Figure":
    """Two panels in `columns` columns, two for a desk, one for a phone: memory of the programs, and the timeline."""
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
    """A bar for every program in the order of the run: what it is given, and what it takes beside that at its peak."""
    bars = []
    for index, stage in enumerate(plan.stages):
        if index:
            growth = plan.growths[index - 1]
            bars.append((f"growth into {growth.to_stage}", growth.program))
            if growth.certificate is not None:
                bars.append(("its certificate", growth.certificate))
        bars.append((f"step of {stage.cost.name}", stage.program))
    labels = [label for label, _ in bars]
    given = [program.arguments / GiB for _, program in bars]
    beside = [max(program.peak - program.arguments, 0) / GiB for _, program in bars]
    panel.barh(labels, given, color=STATE, label="state before")
    panel.barh(labels, beside, left=given, color=TEMPORARY, label="new state, temporaries")
    panel.axvline(plan.usable / GiB, color=LIMIT, linestyle="--", linewidth=1.2, label="for programs")
    panel.axvline(plan.chip.memory / GiB, color=LIMIT, linewidth=1.2, label=plan.chip.kind)
    panel.set_xlim(0, max(plan.chip.memory / GiB, *(program.peak / GiB for _, program in bars)) * 1.05)
    panel.invert_yaxis()
    panel.set_title("Memory of a device (GiB)", loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2, fontsize=7, labelcolor=INK, edgecolor="none")


def _draw_timeline(panel: "Axes", plan: Plan) -> None:
    """Parameters over tokens, like the paper's figure 1: the area is the cost, the rectangle the last model's alone."""
    costs = [stage.cost for stage in plan.stages]
    edges = [0.0]
    for own in costs:
        edges.append(edges[-1] + own.tokens)
    sizes = [float(own.parameters) for own in costs]
    panel.stairs(sizes, edges, fill=True, color=AREA)
    panel.stairs(sizes, edges, baseline=None, color=STATE, linewidth=2)
    panel.plot([0, edges[-1]], [sizes[-1]] * 2, color=INK, linestyle=":", linewidth=1, label="no growth")
    for start, own in zip(edges, costs, strict=False):
        place = (
            {"ha": "right", "va": "top", "xytext": (-4, -4)}
            if start > edges[-1] / 2
            else {"ha": "left", "xytext": (2, 3)}
        )
        text = f"{own.name}, {short(own.parameters)}"
        panel.annotate(text, (start, own.parameters), textcoords="offset points", fontsize=8, color=INK, **place)
    panel.set_ylim(0, sizes[-1] * 1.25)
    panel.set_xlim(0, edges[-1])
    panel.xaxis.set_major_formatter(lambda value, _: short(value))
    panel.yaxis.set_major_formatter(lambda value, _: short(value))
    panel.set_xlabel("tokens", fontsize=9, color=INK)
    panel.set_title("Parameters over tokens", loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.legend(loc="upper left", fontsize=7, labelcolor=INK, edgecolor="none")
