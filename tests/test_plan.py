"""Plans: every program of a run, as text, page and JSON; a program that does not fit is refused."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

from flmjax import cli
from flmjax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    MeshShape,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from flmjax.config.validate import stage_mesh
from flmjax.data.batch import BatchKind
from flmjax.hardware import A800, GiB
from flmjax.planning import planner
from flmjax.planning.calendar import Calendar, Operation
from flmjax.planning.cost import Bill, StageCost
from flmjax.planning.exchanges import Collective
from flmjax.planning.plan import Evaluations, GrowthPlan, Plan, ReplicaSums, Saves, StagePlan, SumCost
from flmjax.planning.planner import check_flops, make_plan, remarks
from flmjax.planning.program import Program
from flmjax.planning.roofline import ExchangeTime, StepTime
from flmjax.report.plan_page import plan_figure, write_plan
from flmjax.report.plan_table import plan_table, stage_rows

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, max_length=32)


# ---- the plan as text, page and JSON ---------------------------------------------------------------------------------


def program(peak: float, name: str = "a program", advice: str = "take less", **fields) -> Program:
    values = {"name": name, "advice": advice}
    values |= {"arguments": int(10 * GiB), "outputs": int(10 * GiB), "aliased": int(10 * GiB), "temporaries": int(GiB)}
    values |= {"peak": int(peak * GiB), "matmul_flops": 1e15, "rematerialisations": 0, "compile_seconds": 1.0}
    exchange = Collective("all-gather", "bf16", 16, 4, 2, 3, 5e9, 100)
    return Program(**{**values, "collectives": (exchange,), **fields})


TENSOR = ExchangeTime("all-gather", "bf16", 4, 1, 4, True, 1.0, 0.25, 0.0)
DATA = ExchangeTime("all-gather", "bf16", 16, 4, 2, False, 2.0, 1.25, 0.0)


def plan_of(*peaks: float, growth: float = 20.0, exact: bool = True) -> Plan:
    """A plan of stages whose steps have these peaks, in GiB."""
    names = [f"s{i}" for i in range(len(peaks))]
    bill = Bill(2.0, 384.0, None, 1.0, 0.6)
    stages = [
        StagePlan(
            cost=StageCost(name, 1000 * (i + 1), 10, 1e9 * (i + 1), 1e21),
            batch_size=96,
            microbatches=2,
            mesh=MeshShape(1, 8, 1),
            remat="full",
            attention="cudnn",
            program=program(peak, f"stages[{i}] ({name})", f"take stages[{i}].microbatches=3"),
            attention_flops=1e14,
            model_flops=1e17,
            step=StepTime(8.0, 0.5, (TENSOR, DATA)),
            bill=bill,
            evaluations=Evaluations(program(peak / 2, f"the evaluation of s{i}"), seconds=20.0, number=11),
            saves=Saves(1.2e12, 3, 1, pause=0.5, written=120.0, interval=2500.0, best=900.0, restart=800.0),
            published=None,
        )
        for i, (name, peak) in enumerate(zip(names, peaks, strict=True))
    ]
    growths = [
        GrowthPlan(
            from_stage=a,
            to_stage=b,
            program=program(growth, f"growth {a} -> {b}"),
            seconds=3.0,
            certificate=program(44.0, f"certificate of {b}"),
            certificate_seconds=30.0,
        )
        for a, b in itertools.pairwise(names)
    ]
    return Plan(
        topology="a800:1x8",
        platform="cuda",
        chip=A800,
        devices=8,
        is_exact=exact,
        usable=70.0 * GiB,
        stages=tuple(stages),
        growths=tuple(growths),
        total=bill,
        calendar=Calendar(pure=7.0, expected=7.5, percentile=8.25, failures=2.0),
        expected=dataclasses.replace(bill, days=7.5),
        operation=Operation(hours_between_failures=100.0),
        saved=0.5,
        saved_days=0.4,
        remarks=("so it is",),
    )


def test_the_table_has_both_costs_of_sums_over_replicas():
    plan = plan_of(50.0, 60.0)
    sums = ReplicaSums("step", step=SumCost(8.5e9, 0.45), microbatch=SumCost(25.5e9, 1.36))
    stages = (plan.stages[0], dataclasses.replace(plan.stages[1], replica_sums=sums))
    rows = {row[0].strip(): row[1:] for row in stage_rows(dataclasses.replace(plan, stages=stages))}
    assert rows["gradients summed over replicas"] == ["-", "once a step"]
    assert rows["costs once a step"] == ["-", "8.50 GB, 0.5 s"]
    assert rows["costs in every microbatch"] == ["-", "25.5 GB, 1.4 s"]
    assert "replicas" not in plan_table(plan)  # no mesh has several


def test_a_program_that_does_not_fit_has_a_refusal():
    assert program(70.0).refusal(A800, 70.0 * GiB) is None
    words = "a program needs 70.1 GiB a device; A800 has 80 GiB, of which programs can use 70.0: take less"
    assert program(70.1).refusal(A800, 70.0 * GiB) == words


def test_a_plan_refuses_each_program_that_does_not_fit():
    assert plan_of(70.0, 69.9).refusals == ()
    plan = plan_of(69.0, 71.25, growth=90.0)
    assert [line.split(" needs ")[0] for line in plan.refusals] == ["stages[1] (s1)", "growth s0 -> s1"]
    assert "NO" in plan_table(plan)
    certified = dataclasses.replace(plan.growths[0], certificate=program(80.0, "the certificate"))
    certified = dataclasses.replace(plan, growths=(certified,))
    assert certified.refusals[-1].startswith("the certificate needs 80.0 GiB")
    assert plan_of(99.0, exact=False).refusals == ()  # the memory of fake devices is not the machine's


def test_the_table_has_a_row_for_each_figure():
    text = plan_table(plan_of(50.0, 60.0))
    lines = {line.strip().split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert lines["step"] == ["step", "10.0", "s", "10.0", "s"]
    assert lines["tensor traffic, exposed"][3:5] == ["0.8", "s"]
    assert lines["data traffic, exposed"][3:5] == ["0.8", "s"]
    assert re.findall(r"hidden by compute +(\S+) s", text) == ["0.2", "1.2"]
    assert "not told" not in text
    assert lines["TFLOP/s a device, estimated"][-1] == f"{1e21 / 10 / 10 / 8 / 1e12:.0f}"
    assert lines["all-gather, network"][-2:] == ["5.0", "GB"]
    assert lines["dollars"] == ["dollars", "-", "-"]
    assert "saved at equal loss: not measured" in text
    assert "calendar: 7.00 days of steps; 7.50 days expected" in text
    assert "2.00 failures; 90 of 100 runs take at most 8.25 days" in text
    assert lines["best interval"][-2:] == ["15", "min"]
    assert "\nso it is\n" in f"{text}\n"
    unknown = plan_table(plan_of(50.0, exact=False))
    assert "bytes, memory and times are not those of the machine" in unknown
    assert "pip install 'flmjax[plan-gpu]'" in unknown
    assert "unknown" in unknown


def test_what_the_program_does_not_tell_is_said_in_words():
    plan = plan_of(50.0, 60.0)
    untold = StepTime(8.0, 0.5, (TENSOR, dataclasses.replace(DATA, hidden=0.0, untold=2.0)))
    text = plan_table(dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], step=untold),)))
    assert re.search(r"exposed, not told by the program +2\.0 s", text)
    assert re.search(r"^step +11\.2 s", text, re.MULTILINE)
    assert "counted as if nothing hid them; with all of them hidden, steps would take 9.2 s" in text


def test_a_program_that_was_counted_wrong_is_refused(monkeypatch):
    """A 7B model on v5p: loops with an unsigned counter counted once made 495 TFLOP/s on a chip of 459."""

    class Wrong(FakeCompiler):
        def step(self, stage):
            return program(3.5, f"step of {stage.name}", collectives=(), matmul_flops=1e6)

    monkeypatch.setattr(planner, "Compiler", Wrong)
    with pytest.raises(ConfigError, match=r"^step of small: 1e\+06 FLOPs were counted in its program, .* needs 4\.\d"):
        make_plan(THREE_STAGES, None)
    amounts = {"executed": 467e12, "needed": 350e12, "rate": 459e12}
    check_flops("a step", **amounts, seconds=1.02)
    with pytest.raises(ConfigError, match=r"^a step: 4\.67e\+14 FLOP/s a device exceed the chip's peak of 4\.59e\+14"):
        check_flops("a step", **amounts, seconds=1.0)
    with pytest.raises(ConfigError, match="were counted"):
        check_flops("a step", **{**amounts, "executed": 212e12}, seconds=10.0)


def test_temporaries_over_the_peak_are_explained():
    plan = plan_of(50.0, 60.0)
    assert "not all alive at once" not in plan_table(plan)
    more = dataclasses.replace(plan.growths[0], program=program(20.0, temporaries=int(21 * GiB)))
    assert "not all alive at once" in plan_table(dataclasses.replace(plan, growths=(more,)))


class FakeCompiler:
    """Programs of 3.5 GiB."""

    def __init__(self, config, topology):
        self.config, self.topology = config, topology
        self.is_exact, self.assumptions = True, ("an assumption",)
        self.batch_kind = BatchKind.of(config.data, bool(config.data.teachers))

    def mesh_shape(self, stage):
        return stage_mesh(self.config, stage, self.topology.num_devices)

    def attention(self, _):
        return "splash"

    def step(self, stage):
        return program(3.5, f"step of {stage.name}", collectives=())

    def evaluation(self, stage):
        return program(3.5, f"evaluation of {stage.name}", collectives=())

    def growth(self, stage):
        return program(3.5, f"growth into {stage.name}", collectives=())

    def certificate(self, stage):
        return program(3.5, f"certificate of {stage.name}", collectives=())


THREE_STAGES = RunConfig(
    model=dataclasses.replace(TINY, vocab_size=64, remat="full"),
    stages=tuple(
        StageConfig(name, steps=100, batch_size=96, microbatches=2, growth=GrowthConfig("learned", tuning_steps=50))
        for name in ("small", "middle", "large")
    ),
    mesh=MeshConfig(1, 8, 1, topology="v6e:2x4"),
)


def test_a_plan_has_every_program_of_a_run(monkeypatch):
    monkeypatch.setattr(planner, "Compiler", FakeCompiler)
    lines = []
    plan = make_plan(THREE_STAGES, None, lines.append)
    assert [one.name for one in plan.programs] == [
        *(f"{kind} of {name}" for name in ("small", "middle", "large") for kind in ("step", "evaluation")),
        "growth into middle",
        "certificate of middle",
        "growth into large",
        "certificate of large",
    ]
    steps = [stage.bill.days * 86_400 / stage.step.seconds for stage in plan.stages]
    assert steps == pytest.approx([100, 150, 150])  # updates that tune the growth take as long
    size = "  peak 3.5 GiB a device, compiled in 1 s"
    assert lines[-6:] == ["certificate of that growth", size, "step of large", size, "evaluation of large", size]
    assert plan.remarks[-1] == "an assumption"
    # Evaluated and saved after every 100 updates.
    assert [stage.evaluations.number for stage in plan.stages] == [1, 1, 1]
    for stage in plan.stages:
        assert stage.saves.bytes == 12 * stage.cost.parameters
        assert stage.saves.interval == pytest.approx(100 * stage.step.seconds)
    assert plan.operation.hours_between_failures == 24 / (8 * 1e-3)
    assert plan.calendar.pure == pytest.approx(sum(stage.bill.days for stage in plan.stages))
    assert plan.calendar.pure < plan.calendar.expected
    assert plan.expected.days == plan.calendar.expected


@pytest.mark.parametrize(
    ("hours", "cure"), [(0.05, "no interval is short enough"), (0.5, r"every_minutes=\d+\.\d would")]
)
def test_a_run_that_fails_before_it_saves_is_refused(hours, cure, monkeypatch):
    """Its days overflowed, or were simulated for ever."""
    monkeypatch.setattr(planner, "Compiler", FakeCompiler)
    long = tuple(dataclasses.replace(stage, steps=10**7) for stage in THREE_STAGES.stages)
    rare = dataclasses.replace(THREE_STAGES, stages=long, checkpoint=CheckpointConfig(every=10**7))
    short = dataclasses.replace(rare, stages=(dataclasses.replace(rare.stages[0], steps=20),))
    assert make_plan(short, None, hours_between_failures=1).stages[0].saves.interval < 600  # its end is saved
    with pytest.raises(ConfigError, match=rf"stage small would hardly end: .*; .*{cure} .*\(--hours-b"):
        make_plan(rare, None, hours_between_failures=hours)


def test_evaluations_count_the_sequences_of_teachers(monkeypatch):
    """As many of teachers as of text are evaluated."""
    monkeypatch.setattr(planner, "Compiler", FakeCompiler)
    many = dataclasses.replace(THREE_STAGES, evaluation_rows=480)
    judged = dataclasses.replace(many, data=DataConfig(sources=("a",), teachers=("b",)))
    text, both = (make_plan(config, None).stages[0].evaluations.seconds for config in (many, judged))
    assert both == pytest.approx(2 * text)


def test_more_failures_take_more_days(monkeypatch):
    monkeypatch.setattr(planner, "Compiler", FakeCompiler)
    long = dataclasses.replace(
        THREE_STAGES,
        stages=tuple(dataclasses.replace(stage, steps=10**7) for stage in THREE_STAGES.stages),
        checkpoint=CheckpointConfig(every=10**7, every_minutes=30),
    )
    rare, often = (make_plan(long, 2.0, hours_between_failures=hours) for hours in (1000, 10))
    assert often.calendar.failures > 50 * rare.calendar.failures
    assert often.calendar.pure == rare.calendar.pure < rare.calendar.expected < often.calendar.expected
    assert {stage.saves.interval for stage in often.stages} == {1800.0}
    assert often.expected.dollars == pytest.approx(often.calendar.expected * 24 * 8 * 2)
    assert "a failure in 10 hours" in plan_table(often)


def test_remarks_name_the_stage_and_the_work_outside_the_plan():
    learned = GrowthConfig("learned", tuning_steps=7)
    model = dataclasses.replace(TINY, embed_dim=5632, head_dim=2816, vocab_size=64, dtype="bfloat16")
    stages = (StageConfig("small", growth=learned), StageConfig("large", growth=learned, embed_dim=10_240, num_heads=4))
    config = RunConfig(model=model, stages=stages)
    gpu, tpu = (list(remarks(config, [MeshShape(1, 64, 1)] * 2, platform)) for platform in ("cuda", "tpu"))
    (tuned,) = gpu
    assert tuned.startswith("large: of 107 updates 7 tune its growth; ")
    assert tpu[1:] == gpu
    assert re.match(
        r"small: over fsdp=64 a shard has 88 of 5632 rows of a matrix, not a multiple of 16: .*; "
        r"replica=2, fsdp=32 avoids it",
        tpu[0],
    )
    assert list(remarks(config, [MeshShape(2, 32, 1)] * 2, "tpu")) == gpu
    single = dataclasses.replace(config, model=dataclasses.replace(model, dtype="float32"))
    assert list(remarks(single, [MeshShape(1, 64, 1)] * 2, "tpu")) == gpu  # 88 rows are eleven tiles of float32


def test_json_and_page_hold_the_same_numbers(tmp_path):
    plan = plan_of(50.0, 75.0)
    path = write_plan(plan, tmp_path / "new")
    tree = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert [stage["program"]["peak"] for stage in tree["stages"]] == [50 * GiB, 75 * GiB]
    step = tree["stages"][0]["step"]
    assert (step["seconds"], step["tensor"]) == (10.0, {"exposed": 0.75, "hidden": 0.25})
    assert step["data"] == {"exposed": 0.75, "hidden": 1.25}
    assert [exchange["exposed"] for exchange in step["exchanges"]] == [0.75, 0.75]
    assert tree["stages"][0]["executed_flops"] == 1.1e15
    assert tree["refusals"] == list(plan.refusals)
    page = path.read_text()
    assert "stages[1] (s1) needs 75.0 GiB" in page
    assert "<script" not in page
    assert page.count("<img") == 1
    assert "<td>75.0 GiB</td>" in page


def test_every_program_has_a_bar():
    plan = plan_of(50.0, 60.0, 70.0)
    panel = plan_figure(plan, columns=2).axes[0]
    ends = [sum(bar.get_width() for bar in pair) for pair in zip(*panel.containers, strict=True)]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert dict(zip(labels, ends, strict=True)) == {
        "step of s0": 50.0,
        "growth into s1": 20.0,
        "certificate of s1": 44.0,
        "step of s1": 60.0,
        "growth into s2": 20.0,
        "certificate of s2": 44.0,
        "step of s2": 70.0,
    }


# ---- bad input -------------------------------------------------------------------------------------------------------

PLAN = ["plan", f"--config={ROOT}/configs/flm_101b.py"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--config.mesh.topology=a900:24x8"],
            r"'a900:24x8' is not a known machine; choices: .*a800:HOSTSx8.*v5p:4x8x8",
        ),
        (["--config.mesh.topology=a800:24x4"], "has hosts of 4 GPUs; those of a800 have 8: a800:24x8"),
        (["--config.mesh.topology=v5p:8x8"], "is not a known machine"),
        (["--config.mesh.topology=v6e:300x300"], "has 90000 chips; a pod of v6e has 256"),
        (["--config.mesh.topology=None"], r"mesh\.topology is None; name the machine"),
        (["--config.mesh.topology=a800:12x8"], "has 192 places for 96 devices; fsdp=32 would match"),
        (
            ["--config.mesh.topology=a800:32x8"],
            "192 places for 256 devices; replica=1, tensor=4 would match",
        ),
        (
            ["--config.stages[0].batch_size=2300", "--config.stages[0].microbatches=2"],
            "batch_size=1920 or .*=2304 would",
        ),
        (["--config.stages[2].microbatches=4"], "540 sequences .* the 48 data shards .*; microbatches=3 would"),
        (
            ["--config.stages[1].mesh.fsdp=32"],
            r"stages\[1\]\.mesh: .* 96 places for 192 devices; replica=6",
        ),
        (
            ["--config.stages[0].mesh.tensor=8", "--config.stages[0].mesh.fsdp=8"],
            "num_heads=44 .* tensor=8; tensor=4",
        ),
        (["--price=-1"], "price"),
        (["--cost-only", "--config.stages[2].mesh.fsdp=None"], r"for example --config\.stages\[2\]\.mesh\.fsdp=8"),
        (
            ["--cost-only", "--config.stages[2].mesh.fsdp=8"],
            r": stages\[0\]\.mesh 192, stages\[2\]\.mesh 96",
        ),
        (["--cost-only", "--config.stages[0].mesh.fsdp=-2"], "mesh.fsdp=-2 must be positive"),
        (["--config.stages[1].mesh.replica=-3"], "mesh.replica=-3 must be positive"),
        (["--config.stages[2].mesh.tensor=0"], "mesh.tensor=0 must be positive"),
        (["--cost-only", "--tflops=0"], "--tflops=0 must be a positive number"),
        (["--cost-only", "--tflops=inf"], "--tflops=inf must be"),
        (["--hours-between-failures=0"], "--hours-between-failures=0 must be a positive number"),
        (["--cost-only", "--hours-between-failures=9"], "--hours-between-failures=9 is not read with --cost-only"),
        (["--price=nan"], "--price=nan must be"),
        (["--hours-between-failures=1e306"], r"--hours-between-failures=1e\+306 must be a positive number below 1e9"),
        (["--config.model.dtype=float64"], "model.dtype='float64' has no price"),
        (["--tflops=100"], "--tflops=100 is read with --cost-only alone"),
        (["--search-layout", "--price=2"], "--price=2 is not read with --search-layout"),
        (["--cost-only", "--search-layout"], "--search-layout is not read with --cost-only"),
        (["--cost-only", "--output=x"], "--output is not read with --cost-only"),
        (["--cost-only", "--config.mesh.topology=v5p:4x8x8"], "--tflops=N states it"),
    ],
)
def test_a_run_that_cannot_be_planned_is_refused_in_one_line(flags, words, capsys):
    assert cli.main([*PLAN, *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.strip().splitlines()) == 1
