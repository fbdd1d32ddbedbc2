"""A plan, and a cost alone, as text for a terminal."""

from collections.abc import Callable, Sequence

from flmjax.config import ConfigError, GradientReduction, RunConfig
from flmjax.hardware import A800, PlannableChip
from flmjax.planning import cost
from flmjax.planning.plan import GrowthPlan, Plan, ReplicaSums, StagePlan, SumCost
from flmjax.planning.program import Program
from flmjax.planning.roofline import Assumptions
from flmjax.planning.topology import PACKAGES
from flmjax.report.page import gib, short
from flmjax.text_table import duration, figure, text_table

Row = list[str]  # of a table: a label, then one cell for each stage or growth


def plan_table(plan: Plan) -> str:
    """The plan as text for a terminal."""
    head = f"{plan.topology}: {plan.devices} x {plan.chip.kind}"
    lines = [head, "", text_table(stage_rows(plan))]
    if plan.growths:
        lines += ["", text_table(growth_rows(plan, "growth", "->"))]
    return "\n".join([*lines, "", *closing(plan)])


def stage_rows(plan: Plan) -> list[Row]:
    """The table of the stages: their names, then a row for each known figure."""
    stages = plan.stages

    def row(label: str, cell: Callable[[StagePlan], str]) -> Row:
        return [label, *map(cell, stages)]

    rows = [
        row("", lambda s: s.cost.name),
        row("parameters", lambda s: short(s.cost.parameters)),
        row("mesh: replica x fsdp x tensor", lambda s: f"{s.mesh.replica} x {s.mesh.fsdp} x {s.mesh.tensor}"),
        row("remat", lambda s: s.remat),
        row("batch / microbatches", lambda s: f"{s.batch_size} / {s.microbatches}"),
        row("attention", lambda s: s.attention),
        row("memory a device: state", lambda s: gib(s.program.arguments)),
        row("  temporaries", lambda s: gib(s.program.temporaries)),
        row("  peak", lambda s: gib(s.program.peak)),
        row(f"  fits {gib(plan.usable)}", lambda s: _fits(plan, s.program)),
        row("model FLOPs a step", lambda s: short(s.model_flops, "FLOP")),
        row("  executed, of one device", lambda s: short(s.executed_flops, "FLOP")),
        *_exchanges(plan, [s.program for s in stages]),
        *_replica_sum_rows(stages),
        row("involuntary rematerialisations", lambda s: str(s.program.rematerialisations)),
        row("compiled in", lambda s: duration(s.program.compile_seconds)),
        row("step", lambda s: duration(s.step.seconds)),
        row("  compute", lambda s: duration(s.step.compute)),
        *_traffic_rows(stages),
        row("  optimizer", lambda s: duration(s.step.update)),
        row("TFLOP/s a device, estimated", lambda s: f"{plan.tflops(s):.0f}"),
        row("  of its peak", lambda s: f"{plan.tflops(s) * 1e12 / plan.chip.bfloat16:.0%}"),
        row("tokens", lambda s: short(s.cost.tokens)),
        row("zettaFLOPs", lambda s: f"{s.cost.flops / 1e21:.4g}"),
        row("days", lambda s: figure(s.bill.days)),
        row("evaluation: peak", lambda s: gib(s.evaluations.program.peak)),
        row(f"  fits {gib(plan.usable)}", lambda s: _fits(plan, s.evaluations.program)),
        row("  number x time", lambda s: f"{s.evaluations.number} x {duration(s.evaluations.seconds)}"),
        row("checkpoint", lambda s: f"{figure(s.saves.bytes / 1e9)} GB"),
        row("  pause of the run / written in", lambda s: f"{duration(s.saves.pause)} / {duration(s.saves.written)}"),
        row("  saved every", lambda s: duration(s.saves.interval)),
        row("  best interval", lambda s: duration(s.saves.best)),
        *bill_rows([s.bill for s in stages]),
    ]
    if any(stage.published for stage in stages):
        rows += [
            row("the paper: TFLOP/s", lambda s: f"{s.published.tflops:.0f}" if s.published else "-"),
            row("  days", lambda s: f"{s.published.days:.2f}" if s.published else "-"),
            row("  tokens", lambda s: short(s.published.tokens) if s.published else "-"),
        ]
    return rows


def _traffic_rows(stages: Sequence[StagePlan]) -> list[Row]:
    """Rows of the seconds of exchanges, tensor and data apart: those that the device waits for, and hidden ones."""
    rows: list[Row] = []
    for name, is_tensor in (("tensor", True), ("data", False)):
        times = [stage.step.traffic(is_tensor) for stage in stages]
        if not any(seconds for seconds, _ in times):
            continue
        rows.append([f"  {name} traffic, exposed", *(duration(seconds - hidden) for seconds, hidden in times)])
        rows.append(["    hidden by compute", *(duration(hidden) for _, hidden in times)])
    if any(stage.step.untold for stage in stages):
        rows.append(["  exposed, not told by the program", *(duration(stage.step.untold) for stage in stages)])
    return rows


def _replica_sum_rows(stages: Sequence[StagePlan]) -> list[Row]:
    """Rows of the sums of gradients over replicas: the stages' setting, and the costs of both settings."""
    if all(stage.replica_sums is None for stage in stages):
        return []
    words: dict[GradientReduction, str] = {"step": "once a step", "microbatch": "in every microbatch"}

    def row(label: str, cell: Callable[[ReplicaSums], str]) -> Row:
        sums = [stage.replica_sums for stage in stages]
        return [label, *("-" if one is None else cell(one) for one in sums)]

    def cost_words(sums: SumCost) -> str:
        return f"{figure(sums.bytes / 1e9)} GB, {duration(sums.seconds)}"

    return [
        row("gradients summed over replicas", lambda s: words[s.reduction]),
        row("  costs once a step", lambda s: cost_words(s.step)),
        row("  costs in every microbatch", lambda s: cost_words(s.microbatch)),
    ]


def growth_rows(plan: Plan, title: str = "", arrow: str = "→") -> list[Row]:
    """The table of the growths: their stages, then a row for each known figure."""
    programs = [growth.program for growth in plan.growths]

    def row(label: str, cell: Callable[[Program], str]) -> Row:
        return [label, *map(cell, programs)]

    def certificate_row(label: str, cell: Callable[[Program], str]) -> Row:
        return [label, *(cell(growth.certificate) for growth in plan.growths)]

    def words(growth: GrowthPlan) -> str:
        return f"{growth.from_stage} {arrow} {growth.to_stage}"

    return [
        [title, *map(words, plan.growths)],
        row("memory a device: old state", lambda p: gib(p.arguments)),
        row("  new state", lambda p: gib(p.outputs)),
        row("  temporaries", lambda p: gib(p.temporaries)),
        row("  peak", lambda p: gib(p.peak)),
        row(f"  fits {gib(plan.usable)}", lambda p: _fits(plan, p)),
        *_exchanges(plan, programs),
        row("involuntary rematerialisations", lambda p: str(p.rematerialisations)),
        ["time", *(duration(growth.seconds) for growth in plan.growths)],
        row("compiled in", lambda p: duration(p.compile_seconds)),
        certificate_row("growth certificate: peak", lambda p: gib(p.peak)),
        certificate_row(f"  fits {gib(plan.usable)}", lambda p: _fits(plan, p)),
        ["  time", *(duration(growth.certificate_seconds) for growth in plan.growths)],
        certificate_row("  compiled in", lambda p: duration(p.compile_seconds)),
    ]


def bill_rows(bills: Sequence[cost.Bill]) -> list[Row]:
    """Rows of the figures that have a price, one cell for each bill."""
    return [
        ["device-hours", *(figure(b.device_hours) for b in bills)],
        ["dollars", *(figure(b.dollars) for b in bills)],
        ["MWh", *(figure(b.megawatt_hours) for b in bills)],
        ["tCO2e", *(figure(b.tonnes_co2e) for b in bills)],
    ]


def closing(plan: Plan) -> list[str]:
    """Lines below the tables: totals, their assumptions, and the programs that do not fit."""
    costs = [stage.cost for stage in plan.stages]
    lines = [totals(costs, plan.total)]
    if [stage.cost.name for stage in plan.stages if stage.published] == list(cost.STAGES):
        lines.append(PAPER)
    lines += calendar_lines(plan)
    lines += savings(plan.saved, plan.saved_days) if len(plan.stages) > 1 else []
    lines.append(str(Assumptions()))
    lines.append(_chip_words(plan.chip, plan.platform))
    if plan.is_exact and plan.compiler_options:
        lines.append(f"steps are compiled, here and in training, with {', '.join(plan.compiler_options)}")
        lines[-1] += " (--config.overlap_collectives, --config.deterministic)"
    elif plan.is_exact:
        lines.append("overlap_collectives=False: steps are compiled without options that hide exchanges")
    if any(stage.step.untold for stage in plan.stages):
        steps = ", ".join(duration(stage.step.seconds - stage.step.untold) for stage in plan.stages)
        lines.append(
            "not told by the program: the compiler fused these exchanges with matrix products, and they are counted as "
            f"if nothing hid them; with all of them hidden, steps would take {steps}"
        )
    programs = [stage.program for stage in plan.stages] + [growth.program for growth in plan.growths]
    if any(program.temporaries > program.peak for program in programs):
        lines.append("temporaries are not all alive at once: the peak is the memory that a device must hold")
    lines += plan.remarks
    if not plan.is_exact:
        lines.append(
            f"the compiler of {plan.topology} is missing (pip install '{PACKAGES[plan.platform]}'): programs were "
            "partitioned for as many CPU devices; bytes, memory and times are not those of the machine"
        )
    return [*lines, *plan.refusals]


def calendar_lines(plan: Plan) -> list[str]:
    """Lines on the days that a run takes with everything that is not a step."""
    days, operation, bill = plan.calendar, plan.operation, plan.expected
    compilation = sum(program.compile_seconds for program in plan.programs)
    return [
        f"calendar: {figure(days.pure)} days of steps; {figure(days.expected)} days expected with evaluations, "
        f"growths, saves, compilation and {figure(days.failures)} failures; 90 of 100 runs take at most "
        f"{figure(days.percentile)} days (simulated)",
        f"expected: {_bill_words(bill)}",
        f"assumed: compilation takes as long as here, {duration(compilation)}; a failure in "
        f"{operation.hours_between_failures:.0f} hours (--hours-between-failures; default: one in 1,000 device-days, "
        f"between those of Llama 3 405B and OPT-175B); {operation.restart / 60:.0f} minutes "
        "until a run restarts, then the checkpoint is read and the step compiled; "
        f"storage {operation.storage / 1e9:.0f} GB/s, {operation.host_link / 1e9:.0f} GB/s from a device to its host; "
        f"at most {figure(plan.checkpoint_bytes / 1e12)} TB of checkpoints",
    ]


def _chip_words(chip: PlannableChip, platform: str) -> str:
    """The figures of the chip that a plan's times and energy follow from."""
    inside, outside = {
        "cuda": ("of NVLink in a node", "between nodes"),
        "tpu": ("of ICI along an axis", "between slices"),
    }[platform]
    links = f"{chip.intra_node / 1e9:.0f} GB/s {inside}, {chip.inter_node / 1e9:.3g} GB/s {outside}"
    links += "; a ring with several devices of a node uses the ports of all" if platform == "cuda" else ""
    carbon = f"{cost.CARBON} kg CO2e a kWh, FLM-101B's"
    watts = "" if chip.watts is None else f"; energy is of the devices alone, {chip.watts:.0f} W, {carbon}"
    speeds = f"{chip.bfloat16 / 1e12:.0f} bfloat16 TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s of HBM"
    return f"{chip.kind}, a device: {speeds}, {links}{watts}"


def totals(costs: Sequence[cost.StageCost], total: cost.Bill) -> str:
    """One line with the sums over all stages."""
    parts = [
        f"{short(sum(c.tokens for c in costs))} tokens",
        f"{sum(c.flops for c in costs) / 1e21:.4g} zettaFLOPs",
        f"{figure(total.days)} days",
        _bill_words(total),
    ]
    return f"in all: {', '.join(parts)}"


def _bill_words(bill: cost.Bill) -> str:
    """The known figures of a bill but its days."""
    figures = {
        "device-hours": bill.device_hours,
        "dollars": bill.dollars,
        "MWh": bill.megawatt_hours,
        "tCO2e": bill.tonnes_co2e,
    }
    return ", ".join(f"{figure(amount)} {unit}" for unit, amount in figures.items() if amount is not None)


PAPER = (
    f"the paper: 311.55 B tokens, {cost.ZETTAFLOPS} zettaFLOPs, {cost.DAYS} days, 101,000 device-hours, 100,000 "
    f"dollars, {cost.MEGAWATT_HOURS:.1f} MWh, {cost.TONNES_CO2E:.1f} tCO2e; {cost.DAYS_FROM_SCRATCH} days from scratch"
)


def savings(flops: float, days: float) -> list[str]:
    """The savings of growth: at equal tokens, which the schedule gives, and at equal loss, which it does not."""
    return [
        f"saved at equal tokens: {flops:.1%} of FLOPs, {days:.1%} of days, against the last model from scratch",
        "saved at equal loss: not measured; it does not follow from the schedule",
    ]


def _exchanges(plan: Plan, programs: Sequence[Program]) -> list[Row]:
    """Rows of the bytes that a device sends in each program, by kind of collective and link."""
    amounts: dict[tuple[str, str], list[float]] = {}
    for i, program in enumerate(programs):
        for exchange in program.collectives:
            inside = {"cuda": "in node", "tpu": "torus"}[plan.platform]
            link = inside if exchange.in_node == exchange.group else "network"
            amounts.setdefault((exchange.kind, link), [0.0] * len(programs))[i] += exchange.bytes
    shown = {key: sent for key, sent in amounts.items() if max(sent) > 1e8}  # less: norms of gradients, sums of losses
    return [[f"{kind}, {link}", *(f"{n / 1e9:.1f} GB" for n in sent)] for (kind, link), sent in shown.items()]


def _fits(plan: Plan, program: Program) -> str:
    if not plan.is_exact:
        return "unknown"
    return "yes" if program.fits(plan.usable) else "NO"


# ---- cost alone ------------------------------------------------------------------------------------------------------


def cost_table(config: RunConfig, speed: float | None, price: float | None) -> str:
    """Cost of a schedule at a known speed, as text for a terminal. Nothing is compiled, and JAX is not needed.

    Args:
        speed: model TFLOP/s of one device; None: the speeds that the paper states for its stages.
        price: dollars for a device-hour; None: the paper's for A800s, otherwise unknown.

    Raises:
        ConfigError: without a speed for a stage, or a size of mesh.fsdp.
    """
    num_devices = _num_devices(config)
    costs = cost.stage_costs(config)
    on_a800s = (config.mesh.topology or "").startswith("a800:")
    papers = cost.published(costs) if on_a800s else [None] * len(costs)
    speeds = _speeds(costs, papers, speed)
    # The paper's A800s, or unknown devices whose speed the user states.
    machine = cost.machine_of(A800, num_devices, price) if speed is None else cost.Machine(num_devices, price)
    availability = cost.AVAILABILITY if speed is None else 1.0
    days = [cost.days(c.flops, machine, s * 1e12, availability) for c, s in zip(costs, speeds, strict=True)]
    rows: list[Row] = [
        ["", *(c.name for c in costs)],
        ["parameters", *(short(c.parameters) for c in costs)],
        ["steps", *(f"{c.steps:,}" for c in costs)],
        ["tokens", *(short(c.tokens) for c in costs)],
        ["zettaFLOPs", *(f"{c.flops / 1e21:.4g}" for c in costs)],
        ["TFLOP/s a device", *(f"{s:g}" for s in speeds)],
        ["days", *(f"{d:.2f}" for d in days)],
        *bill_rows([cost.bill(machine, d) for d in days]),
    ]
    if any(papers):
        rows.append(["the paper: days", *(f"{paper.days:.2f}" if paper else "-" for paper in papers)])
    scratch = cost.cost_from_scratch(config)
    lines = [text_table(rows), "", totals(costs, cost.bill(machine, sum(days)))]
    if [c.name for c, paper in zip(costs, papers, strict=True) if paper] == list(cost.STAGES):
        lines.append(PAPER)
    if len(costs) > 1:
        flops = cost.saved_at_equal_tokens([c.flops for c in costs], scratch)
        days_from_scratch = cost.days(scratch, machine, speeds[-1] * 1e12, availability)
        lines += savings(flops, cost.saved_at_equal_tokens(days, days_from_scratch))
    lines += _cost_remarks(costs, is_paper_speed=speed is None)
    if any(papers):
        lines += [
            "",
            f"published zettaFLOPs, and those of the same formula: the mean of its factor without recomputation "
            f"({cost.PLAIN}) and with every layer recomputed ({cost.RECOMPUTED}), +- half their distance; GLM-130B: "
            f"recomputed",
            peers_table(),
        ]
    return "\n".join(lines)


def _num_devices(config: RunConfig) -> int:
    """Number of devices in the meshes of the stages.

    Raises:
        ConfigError: without a size of the vocabulary or of a mesh, or if the meshes of two stages differ in number.
    """
    flags = ["model.vocab_size=4096"] if config.model.vocab_size is None else []
    counts: dict[int, str] = {}
    for stage in config.schedule:
        mesh, setting = stage.layout.mesh, stage.setting_of("mesh")
        if mesh.fsdp is None:
            flags.append(f"{setting}.fsdp=8")
        else:
            counts.setdefault(mesh.replica * mesh.fsdp * mesh.tensor, setting)
    if flags:
        words = " ".join(f"--config.{flag}" for flag in dict.fromkeys(flags))
        raise ConfigError(f"a cost needs the size of the vocabulary and of the mesh, for example {words}")
    if len(counts) > 1:
        words = ", ".join(f"{setting} {count}" for count, setting in counts.items())
        raise ConfigError(f"the meshes of the stages have different numbers of devices: {words}")
    return next(iter(counts))


def _speeds(
    costs: Sequence[cost.StageCost], papers: Sequence[cost.Published | None], speed: float | None
) -> list[float]:
    """Model TFLOP/s of a device in each stage."""
    speeds = [speed if speed is not None else paper.tflops if paper else None for paper in papers]
    if missing := [stage.name for stage, known in zip(costs, speeds, strict=True) if known is None]:
        raise ConfigError(
            f"no speed is known for stage {', '.join(missing)}; --tflops=N states it, in 1e12 model FLOPs a second of "
            "one device"
        )
    return [known for known in speeds if known is not None]


def _cost_remarks(costs: Sequence[cost.StageCost], is_paper_speed: bool) -> list[str]:
    """Lines on the assumptions of a cost."""
    recomputed = sum(c.flops for c in costs) / 1e21 * cost.RECOMPUTED / cost.PLAIN
    speed = "days are without pauses"
    if is_paper_speed:
        speed = (
            f"speeds and {A800.watts:.0f} W a device are those of the paper's A800s; the devices compute "
            f"{cost.AVAILABILITY:.1%} of the time, a share derived from the paper's days"
        )
    flops = f"FLOPs are without recomputation; with every layer recomputed, {recomputed:.4g} zettaFLOPs"
    return [flops, speed, *cost.tuning_words(costs)]


def peers_table() -> str:
    """Published training costs beside those of the formula for the same shapes, in zettaFLOPs."""
    rows: list[Row] = [["", "published", "computed"]]
    for peer in cost.PEERS:
        amount, spread = peer.computed
        rows.append([peer.name, _spread(peer.zettaflops, peer.spread), _spread(amount, spread)])
    return text_table(rows)


def _spread(amount: float, spread: float | None) -> str:
    return f"{amount:.2f}" if spread is None else f"{amount:.2f} +- {spread:.2f}"
