"""A plan and a cost, in words for a terminal."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flmjax.config import ConfigError, RunConfig
from flmjax.hardware import A800, Chip, GiB
from flmjax.planning import cost
from flmjax.planning.plan import Plan, StagePlan, machine_of, tflops, tuning_words
from flmjax.planning.roofline import Assumptions
from flmjax.planning.topology import PACKAGES
from flmjax.report.page import short
from flmjax.text_table import text_table

if TYPE_CHECKING:
    from flmjax.planning.compile import Program

Row = tuple[str, list[str]]


def table(plan: Plan) -> str:
    """The plan for a terminal."""
    names = [stage.cost.name for stage in plan.stages]
    mesh = f"replica {plan.mesh.replica} x fsdp {plan.mesh.fsdp} x tensor {plan.mesh.tensor}"
    head = f"{plan.topology}: {plan.devices} x {plan.chip.kind}, mesh {mesh}"
    lines = [head, "", _aligned([("", names), *stage_rows(plan)])]
    if plan.growths:
        growths = [f"{growth.from_stage} -> {growth.to_stage}" for growth in plan.growths]
        lines += ["", _aligned([("growth", growths), *growth_rows(plan)])]
    return "\n".join([*lines, "", *closing(plan)])


def stage_rows(plan: Plan) -> list[Row]:
    """(label, one cell a stage) of everything that is known of the stages."""
    stages = plan.stages

    def row(label: str, cell: Callable[[StagePlan], str]) -> Row:
        return label, [cell(stage) for stage in stages]

    rows = [
        row("parameters", lambda s: short(s.cost.parameters)),
        row("batch / microbatches", lambda s: f"{s.batch_size} / {s.microbatches}"),
        row("attention", lambda s: s.attention),
        row("memory a device: state", lambda s: _gib(s.program.arguments)),
        row("  temporaries", lambda s: _gib(s.program.temporaries)),
        row("  peak", lambda s: _gib(s.program.peak)),
        row(f"  fits {_gib(plan.usable)}", lambda s: _fits(plan, s.program)),
        row("model FLOPs a step", lambda s: short(s.model_flops, "FLOP")),
        row("executed, a device", lambda s: short(s.executed_flops, "FLOP")),
        *_exchanges(plan, [s.program for s in stages]),
        row("rematerialisations", lambda s: str(s.program.rematerialisations)),
        row("compiled in", lambda s: f"{s.program.compile_seconds:.0f} s"),
        row("step", lambda s: f"{s.step.seconds:.1f} s"),
        row("  compute", lambda s: f"{s.step.compute:.1f} s"),
        row("  tensor traffic", lambda s: f"{s.step.tensor:.1f} s"),
        row("  data traffic, shown", lambda s: f"{s.step.data - s.step.hidden:.1f} of {s.step.data:.1f} s"),
        row("TFLOP/s a device", lambda s: f"{tflops(s, plan.devices):.0f}"),
        row("tokens", lambda s: short(s.cost.tokens)),
        row("zettaFLOPs", lambda s: f"{s.cost.flops / 1e21:.4g}"),
        row("days", lambda s: f"{s.bill.days:.2f}"),
        *bill_rows([s.bill for s in stages]),
    ]
    if any(stage.published for stage in stages):
        rows += [
            row("the paper: TFLOP/s", lambda s: f"{s.published.tflops:.0f}" if s.published else "-"),
            row("  days", lambda s: f"{s.published.days:.2f}" if s.published else "-"),
            row("  tokens", lambda s: short(s.published.tokens) if s.published else "-"),
        ]
    return rows


def growth_rows(plan: Plan) -> list[Row]:
    """(label, one cell a growth)."""
    programs = [growth.program for growth in plan.growths]
    proofs = [growth.certificate for growth in plan.growths]
    return [
        ("memory a device: old state", [_gib(p.arguments) for p in programs]),
        ("  new state", [_gib(p.outputs) for p in programs]),
        ("  temporaries", [_gib(p.temporaries) for p in programs]),
        ("  peak", [_gib(p.peak) for p in programs]),
        (f"  fits {_gib(plan.usable)}", [_fits(plan, p) for p in programs]),
        *_exchanges(plan, programs),
        ("rematerialisations", [str(p.rematerialisations) for p in programs]),
        ("compiled in", [f"{p.compile_seconds:.0f} s" for p in programs]),
        ("its certificate: peak", ["-" if p is None else _gib(p.peak) for p in proofs]),
        (f"  fits {_gib(plan.usable)}", ["-" if p is None else _fits(plan, p) for p in proofs]),
        ("  compiled in", ["-" if p is None else f"{p.compile_seconds:.0f} s" for p in proofs]),
    ]


def bill_rows(bills: Sequence[cost.Bill]) -> list[Row]:
    """(label, one cell a bill) of what has a price."""
    return [
        ("device-hours", [f"{b.device_hours:,.0f}" for b in bills]),
        ("dollars", [_or_dash(b.dollars, ",.0f") for b in bills]),
        ("MWh", [_or_dash(b.megawatt_hours, ".1f") for b in bills]),
        ("tCO2e", [_or_dash(b.tonnes_co2e, ".1f") for b in bills]),
    ]


def closing(plan: Plan) -> list[str]:
    """Totals, what they rest on, and what does not fit."""
    costs = [stage.cost for stage in plan.stages]
    lines = [totals(costs, plan.total)]
    if [stage.cost.name for stage in plan.stages if stage.published] == list(cost.STAGES):
        lines.append(PAPER)
    lines += savings(plan.saved, plan.saved_days) if len(plan.stages) > 1 else []
    lines.append(str(Assumptions()))
    lines.append(_machine_words(plan.chip))
    programs = [stage.program for stage in plan.stages] + [growth.program for growth in plan.growths]
    if any(program.temporaries > program.peak for program in programs):
        lines.append("temporaries are not all alive at once: the peak is what a device must hold")
    lines += plan.remarks
    if not plan.is_exact:
        lines.append(
            f"the compiler of {plan.topology} is missing (pip install '{PACKAGES[plan.platform]}'): programs were "
            "partitioned for as many CPU devices; bytes, memory and times are not to be trusted"
        )
    return [*lines, *plan.refusals]


def _machine_words(chip: Chip) -> str:
    """What a plan's times and energy rest on."""
    links = f"{chip.near / 1e9:.0f} GB/s to neighbours"
    if chip.far:
        links = f"{chip.near / 1e9:.0f} GB/s in a node, {chip.far / 1e9:.0f} GB/s a device between nodes"
    watts = "" if chip.watts is None else f"; energy is of the devices alone, {chip.watts:.0f} W"
    speeds = f"{chip.bfloat16 / 1e12:.0f} bfloat16 TFLOP/s, memory {chip.bandwidth / 1e9:.0f} GB/s"
    return f"{chip.kind}: {speeds}, {links}{watts}"


def totals(costs: Sequence[cost.StageCost], total: cost.Bill) -> str:
    """One line on the whole run."""
    parts = [
        f"{short(sum(c.tokens for c in costs))} tokens",
        f"{sum(c.flops for c in costs) / 1e21:.4g} zettaFLOPs",
        f"{total.days:.1f} days",
        f"{total.device_hours:,.0f} device-hours",
        f"{_or_dash(total.dollars, ',.0f')} dollars",
        f"{_or_dash(total.megawatt_hours, '.1f')} MWh",
        f"{_or_dash(total.tonnes_co2e, '.1f')} tCO2e",
    ]
    return f"in all: {', '.join(parts)}"


PAPER = (
    f"the paper: 311.55 B tokens, {cost.ZETTAFLOPS} zettaFLOPs, {cost.DAYS} days, 101,000 device-hours, 100,000 "
    f"dollars, {cost.MEGAWATT_HOURS:.1f} MWh, {cost.TONNES_CO2E:.1f} tCO2e; {cost.DAYS_FROM_SCRATCH} days from scratch"
)


def savings(flops: float, days: float) -> list[str]:
    """What growth saves, by its two names."""
    return [
        f"saved at equal tokens: {flops:.1%} of FLOPs, {days:.1%} of days, against the last model from scratch",
        "saved at equal loss: not measured; no arithmetic on a schedule says it",
    ]


def _exchanges(plan: Plan, programs: Sequence["Program"]) -> list[Row]:
    """Bytes that a device sends in a step, by kind of collective and link."""
    amounts: dict[tuple[str, str], list[float]] = {}
    for i, program in enumerate(programs):
        for exchange in program.collectives:
            link = "in node" if exchange.in_node == exchange.group else "network"
            link = link if plan.chip.far else "torus"
            amounts.setdefault((exchange.kind, link), [0.0] * len(programs))[i] += exchange.bytes
    shown = {key: sent for key, sent in amounts.items() if max(sent) > 1e8}  # less: norms of gradients, sums of losses
    return [(f"{kind}, {link}", [f"{n / 1e9:.1f} GB" for n in sent]) for (kind, link), sent in shown.items()]


def _fits(plan: Plan, program: "Program") -> str:
    if not plan.is_exact:
        return "unknown"
    return "yes" if program.peak <= plan.usable else "NO"


def _gib(size: float) -> str:
    return f"{size / GiB:.1f} GiB"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _aligned(rows: Sequence[Row]) -> str:
    return text_table([[label, *cells] for label, cells in rows])


# ---- cost alone ------------------------------------------------------------------------------------------------------


def cost_table(config: RunConfig, speed: float | None, price: float | None) -> str:
    """What a schedule costs at a given speed: no machine is compiled for, and JAX is not needed.

    Args:
        speed: model TFLOP/s of one device; None: those that the paper states for its stages.
        price: dollars for a device-hour.

    Raises:
        ConfigError: without a speed for a stage, or a size of mesh.fsdp.
    """
    costs = cost.stage_costs(config)
    found = cost.published(costs) if (config.mesh.topology or "").startswith("a800:") else [None] * len(costs)
    speeds = [speed if speed is not None else p.tflops if p is not None else None for p in found]
    missing = [c.name for c, s in zip(costs, speeds, strict=True) if s is None]
    if missing:
        raise ConfigError(f"no speed is known for stage {', '.join(missing)}; --tflops=N gives model TFLOP/s a device")
    mesh = config.mesh
    if mesh.fsdp is None:
        raise ConfigError("mesh.fsdp is None; a cost needs the number of devices, as in --config.mesh.fsdp=1")
    devices = mesh.replica * mesh.fsdp * mesh.tensor
    machine = machine_of(A800, devices, price) if speed is None else cost.Machine(devices, price)
    rates = [float(s) for s in speeds if s is not None]
    availability = cost.AVAILABILITY if speed is None else 1.0
    days = [cost.days(c.flops, machine, r * 1e12, availability) for c, r in zip(costs, rates, strict=True)]
    bills = [cost.bill(machine, d) for d in days]
    rows: list[Row] = [
        ("", [c.name for c in costs]),
        ("parameters", [short(c.parameters) for c in costs]),
        ("steps", [f"{c.steps:,}" for c in costs]),
        ("tokens", [short(c.tokens) for c in costs]),
        ("zettaFLOPs", [f"{c.flops / 1e21:.4g}" for c in costs]),
        ("TFLOP/s a device", [f"{rate:g}" for rate in rates]),
        ("days", [f"{d:.2f}" for d in days]),
        *bill_rows(bills),
    ]
    if any(found):
        rows.append(("the paper: days", [f"{p.days:.2f}" if p else "-" for p in found]))
    scratch = cost.cost_from_scratch(config)
    days_from_scratch = cost.days(scratch, machine, rates[-1] * 1e12, availability)
    lines = [_aligned(rows), "", totals(costs, cost.bill(machine, sum(days)))]
    if [c.name for c, p in zip(costs, found, strict=True) if p] == list(cost.STAGES):
        lines.append(PAPER)
    if len(costs) > 1:
        flops = cost.saved_at_equal_tokens([c.flops for c in costs], scratch)
        lines += savings(flops, cost.saved_at_equal_tokens(days, days_from_scratch))
    recomputed = sum(c.flops for c in costs) / 1e21 * cost.RECOMPUTED / cost.PLAIN
    lines.append(f"FLOPs are without recomputation; with every layer recomputed, {recomputed:.4g} zettaFLOPs")
    if speed is None:
        lines.append(
            f"speeds and {A800.watts:.0f} W a device are of the paper's A800s; {availability:.1%} of the days compute, "
            "which is derived from its days"
        )
    else:
        lines.append("days are without pauses")
    lines += tuning_words(costs)
    if any(found):
        lines += ["", "as published: factors 72 to 96 of the formula, and 96 for GLM-130B", peers_table()]
    return "\n".join(lines)


def peers_table() -> str:
    """Published training costs, and what the formula makes of the same shapes."""
    rows: list[Row] = [("", ["published", "computed"])]
    for peer in cost.PEERS:
        amount, spread = peer.computed
        rows.append((peer.name, [_spread(peer.zettaflops, peer.spread), _spread(amount, spread)]))
    return _aligned(rows)


def _spread(amount: float, spread: float | None) -> str:
    return f"{amount:.2f}" if spread is None else f"{amount:.2f} +- {spread:.2f}"
