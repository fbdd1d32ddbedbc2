"""Plans: the planned programs are those that train; full-size programs fit; programs that do not fit are refused."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from flmjax import cli
from flmjax.config import (
    ConfigError,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from flmjax.hardware import A800, Chip, GiB, chip_of
from flmjax.planning import compile as compile_module
from flmjax.planning import planner
from flmjax.planning.compile import Compiler, compile_program, teachers_of
from flmjax.planning.cost import Bill, StageCost
from flmjax.planning.hlo import Collective
from flmjax.planning.layout_search import memory
from flmjax.planning.plan import GrowthPlan, Plan, StagePlan
from flmjax.planning.planner import make_plan, remarks
from flmjax.planning.program import Program
from flmjax.planning.roofline import Assumptions, StepTime, fused_attention_flops, link_bandwidth, step_time
from flmjax.planning.topology import TooLargeError, Topology, parse_topology
from flmjax.report.plan_page import plan_figure, write_plan
from flmjax.report.plan_table import plan_table
from flmjax.training import loop

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, max_length=32)


# ---- the same program ------------------------------------------------------------------------------------------------


@pytest.fixture
def lowering(monkeypatch):
    """Makes Compilers for this process's eight CPU devices; instead of a Program they give its lowered text."""
    monkeypatch.setattr(compile_module, "devices_of", lambda _: jax.devices())
    monkeypatch.setattr(
        compile_module, "compile_program", lambda program, arguments, *_, **__: program.lower(*arguments).as_text()
    )
    topology = Topology("cpu", "cuda", A800, num_devices=8, node_size=4)
    return lambda config: Compiler(config, topology)


TASKS = """
import tensorflow as tf
import seqio
from flmjax.data.sources.tasks import TEXT, add_text_task, local_files_source

def judged(split, shuffle_files=False, seed=None):
    numbers = tf.data.Dataset.range(300)
    text = lambda i: tf.strings.join([tf.strings.as_string(i), " is a number"])
    return numbers.map(lambda i: {"targets": text(i), "judgement": i % 2 == 0})

add_text_task("plan_text", local_files_source({"train": "text.txt"}))
source = seqio.FunctionDataSource(judged, splits=("train",))
seqio.TaskRegistry.add("plan_judged", source, preprocessors=[], output_features={"targets": TEXT})
seqio.MixtureRegistry.add("plan_mixture", [("plan_text", 1.0), ("plan_judged", 1.0)])
"""


@pytest.mark.parametrize(
    "data",
    [
        {"sources": ("text.txt",)},
        {"sources": ("text.txt",), "document_attention": True},
        {"mixture": "plan_mixture", "task_module": "plan_tasks"},
    ],
    ids=["text", "document_attention", "mixture_with_teachers"],
)
def test_the_planned_programs_are_those_that_train(data, lowering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"some text, number {i}, and more of it" for i in range(300)))
    (tmp_path / "plan_tasks.py").write_text(TASKS)
    mask = GrowthConfig("mask", ramp_steps=1, rate_policy="stage")
    config = RunConfig(
        model=dataclasses.replace(TINY, dropout=0.1, remat="full"),
        stages=(
            StageConfig("small", steps=1, batch_size=8),
            StageConfig("large", steps=2, batch_size=16, microbatches=2, growth=mask, num_layers=3, embed_dim=48),
        ),
        data=DataConfig(vocabulary="bytes", **data),
        mesh=MeshConfig(2, 2, 2),
        evaluation_rows=8,
    )
    lowered = []

    def spy(function):
        def recorded(*arguments):
            program = function(*arguments)

            def call(*values):
                lowered.append(program.lower(*values).as_text())
                return program(*values)

            return call

        return recorded

    for name in ("compile_step", "compile_growth"):
        monkeypatch.setattr(loop, name, spy(getattr(loop, name)))
    loop.train(config, tmp_path / "run")
    small, growth, masked, _ = lowered
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    compiler = lowering(config)
    first, second = config.schedule
    assert compiler.step(first) == small
    assert compiler.growth(second) == growth
    assert compiler.step(second) == masked


@pytest.mark.parametrize(
    ("data", "has_teachers"),
    [
        (DataConfig(), False),
        (DataConfig(sources=(), teachers=("hsk_levels",)), True),
        (DataConfig(mixture="flm_c4"), False),
        (DataConfig(mixture="super_glue_judgements"), True),
        (DataConfig(mixture="eflm_c4"), True),
        (DataConfig(mixture="c4_en"), False),
    ],
    ids=["text", "teachers", "text_mixture", "teacher_mixture", "both", "task"],
)
def test_a_mixture_has_the_teachers_of_its_tasks(data, has_teachers):
    """None of these data sets is on the machine."""
    assert teachers_of(data) == (has_teachers, ())


def test_a_mixture_with_teachers_is_planned_as_teachers_are(lowering):
    def step(**data):
        config = RunConfig(
            model=dataclasses.replace(TINY, vocab_size=64),
            stages=(StageConfig(batch_size=8),),
            data=DataConfig(**data),
            mesh=MeshConfig(2, 2, 2),
        )
        return lowering(config).step(config.schedule[0])

    teachers = step(mixture="eflm_c4")
    assert teachers == step(teachers=("hsk_levels",))
    assert teachers != step(mixture="flm_c4") == step()


def test_an_unknown_kind_of_data_is_a_remark(monkeypatch):
    from flmjax.data.sources import tasks

    source = tasks.seqio.TfdsDataSource("not_prepared:1.0.0", splits=("train",))
    tasks.seqio.TaskRegistry.add("plan_foreign", source, preprocessors=[], output_features={"targets": tasks.TEXT})
    has_teachers, (remark,) = teachers_of(DataConfig(mixture="plan_foreign"))
    assert not has_teachers
    assert re.search("'plan_foreign': only its data set can tell .*; the plan assumes text without teachers", remark)
    monkeypatch.delattr("flmjax.data.sources.tasks")
    monkeypatch.setitem(sys.modules, "seqio", None)
    monkeypatch.delitem(sys.modules, "flmjax.data.sources.tasks")
    has_teachers, (remark,) = teachers_of(DataConfig(mixture="eflm_c4"))
    assert not has_teachers
    assert re.search(r"pip install 'flmjax\[data\]'; the plan assumes text without teachers", remark)


def test_a_mixture_that_is_not_registered_is_refused():
    with pytest.raises(
        ConfigError, match=r"data\.mixture: there is no Task or Mixture 'eflm_c5'; did you mean eflm_c4"
    ):
        teachers_of(DataConfig(mixture="eflm_c5"))


# ---- time by hand ----------------------------------------------------------------------------------------------------


def test_a_step_time_is_the_sum_of_its_parts():
    model = dataclasses.replace(TINY, dtype="bfloat16", remat="full")
    assumed = Assumptions(matmul=0.5, attention=0.25, memory=0.5, link=0.5, overlap=0.5, bytes_per_token=10)
    exchanges = (
        Collective("all-gather", "bf16", 2, 1, 2, 1, 100e9, 1),  # tensor: NVLink, 200 GB/s
        Collective("all-gather", "bf16", 16, 2, 4, 1, 50e9, 1),  # four ports of 25 GB/s a node
        Collective("all-reduce", "f32", 16, 2, 1, 1, 25e9, 1),
    )
    time = step_time(
        model,
        A800,
        MeshConfig(1, 16, 2),
        tokens=1e6,
        matmul_flops=312e12,
        attention_flops=312e12,
        state_bytes=2039e9 / 2 * 3 / 7,
        collectives=exchanges,
        assumed=assumed,
    )
    between = 10 * 32 * 4 * 2 * 1e6 / (2039e9 * 0.5)
    assert time.compute == pytest.approx(2 + 4 + between)
    assert time.tensor == pytest.approx(1.0)
    assert time.data == pytest.approx(1.0 + 2.0)
    assert time.hidden == pytest.approx(3.0)  # less than half of the computation
    assert time.update == pytest.approx(1.0)
    assert time.seconds == pytest.approx(2 + 4 + between + 1 + 0 + 1)


def test_on_a_torus_weights_are_hidden_and_tensor_traffic_is_not():
    chip = parse_topology("v5p:4x8x8").chip
    rings = ((64, 4), (4, 1))
    exchanges = [Collective("all-gather", "bf16", *ring, ring[0], 1, chip.intra_node, 1) for ring in rings]
    time = step_time(
        dataclasses.replace(TINY, dtype="bfloat16"),
        chip,
        MeshConfig(1, 64, 4),
        tokens=0.0,
        matmul_flops=chip.bfloat16 * 100,
        attention_flops=0.0,
        state_bytes=0.0,
        collectives=exchanges,
    )
    second = pytest.approx(1 / Assumptions().link)
    assert (time.data, time.hidden, time.tensor) == (second, second, second)


@pytest.mark.parametrize(
    ("ring", "in_node", "is_tensor"),
    [
        ((4, 1), 4, True),
        ((4, 4), 2, False),
        ((4, 4), 4, False),
        ((2, 2), 2, True),
        ((8, 1), 8, False),
        ((4, 1), 2, True),
    ],
)
def test_tensor_traffic_is_that_along_the_last_axis(ring, in_node, is_tensor):
    exchange = Collective("all-gather", "bf16", *ring, in_node, 1, 1e9, 1)
    time = step_time(
        TINY, A800, MeshConfig(1, 4, 4), tokens=0, matmul_flops=0, attention_flops=0, state_bytes=0,
        collectives=[exchange],
    )  # fmt: skip
    assert (time.tensor > 0, time.data > 0) == (is_tensor, not is_tensor)


def test_flops_of_fused_attention_by_hand():
    assert fused_attention_flops(dataclasses.replace(TINY, remat="none"), 10) == (2 + 5) * 2 * 32 * 32 * 10
    assert fused_attention_flops(dataclasses.replace(TINY, remat="full"), 10) == (2 * 2 + 5) * 2 * 32 * 32 * 10


@pytest.mark.parametrize(("group", "in_node", "rate"), [(8, 8, 200e9), (16, 4, 100e9), (32, 16, 200e9), (16, 1, 25e9)])
def test_a_ring_has_the_network_ports_of_its_members_in_a_node(group, in_node, rate):
    assert link_bandwidth(A800, Collective("all-gather", "bf16", group, 1, in_node, 1, 1e9, 1)) == rate


# ---- the plan as text, page and JSON ---------------------------------------------------------------------------------


def program(peak: float, name: str = "a program", advice: str = "take less", **fields) -> Program:
    values = {"name": name, "advice": advice}
    values |= {"arguments": int(10 * GiB), "outputs": int(10 * GiB), "aliased": int(10 * GiB), "temporaries": int(GiB)}
    values |= {"peak": int(peak * GiB), "matmul_flops": 1e15, "rematerialisations": 0, "compile_seconds": 1.0}
    exchange = Collective("all-gather", "bf16", 16, 4, 2, 3, 5e9, 100)
    return Program(**{**values, "collectives": (exchange,), **fields})


def plan_of(*peaks: float, growth: float = 20.0, exact: bool = True) -> Plan:
    """A plan of stages whose steps have these peaks, in GiB."""
    names = [f"s{i}" for i in range(len(peaks))]
    bill = Bill(2.0, 384.0, None, 1.0, 0.6)
    stages = [
        StagePlan(
            cost=StageCost(name, 1000 * (i + 1), 10, 1e9 * (i + 1), 1e21),
            batch_size=96,
            microbatches=2,
            attention="cudnn",
            program=program(peak, f"stages[{i}] ({name})", f"take stages[{i}].microbatches=3"),
            attention_flops=1e14,
            model_flops=1e17,
            step=StepTime(8.0, 1.0, 2.0, 1.5, 0.5),
            bill=bill,
            published=None,
        )
        for i, (name, peak) in enumerate(zip(names, peaks, strict=True))
    ]
    growths = [GrowthPlan(a, b, program(growth, f"growth {a} -> {b}")) for a, b in itertools.pairwise(names)]
    return Plan(
        topology="a800:1x8",
        platform="cuda",
        chip=A800,
        devices=8,
        mesh=MeshConfig(1, 8, 1),
        is_exact=exact,
        usable=70.0 * GiB,
        stages=tuple(stages),
        growths=tuple(growths),
        total=bill,
        saved=0.5,
        saved_days=0.4,
        remarks=("so it is",),
    )


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
    assert lines["data traffic"][2:4] == ["2.0", "s"]
    assert lines["hidden by compute"][3:5] == ["1.5", "s"]
    assert lines["TFLOP/s a device"][-1] == f"{1e21 / 10 / 10 / 8 / 1e12:.0f}"
    assert lines["all-gather, network"][-2:] == ["5.0", "GB"]
    assert lines["dollars"] == ["dollars", "-", "-"]
    assert "saved at equal loss: not measured" in text
    assert "\nso it is\n" in f"{text}\n"
    unknown = plan_table(plan_of(50.0, exact=False))
    assert "bytes, memory and times are not those of the machine" in unknown
    assert "pip install 'flmjax[plan-gpu]'" in unknown
    assert "unknown" in unknown


def test_temporaries_over_the_peak_are_explained():
    plan = plan_of(50.0, 60.0)
    assert "not all alive at once" not in plan_table(plan)
    more = dataclasses.replace(plan.growths[0], program=program(20.0, temporaries=int(21 * GiB)))
    assert "not all alive at once" in plan_table(dataclasses.replace(plan, growths=(more,)))


class FakeCompiler:
    """Programs of 3.5 GiB."""

    def __init__(self, config, topology):
        self.config, self.topology = config, topology
        self.mesh_config, self.is_exact, self.assumptions = config.mesh, True, ("an assumption",)

    def attention(self, _):
        return "splash"

    def step(self, stage):
        return program(3.5, f"step of {stage.name}", collectives=())

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
    assert [growth.certificate is not None for growth in plan.growths] == [False, True]
    assert [one.name for one in plan.programs[3:]] == [
        "growth into middle",
        "growth into large",
        "certificate of large",
    ]
    steps = [stage.bill.days * 86_400 / stage.step.seconds for stage in plan.stages]
    assert steps == pytest.approx([100, 150, 150])  # updates that tune the growth take as long
    size = "  peak 3.5 GiB a device, compiled in 1 s"
    assert lines[-4:] == ["certificate of that growth", size, "step of large", size]
    assert plan.remarks[-1] == "an assumption"


@pytest.mark.parametrize(
    ("kind", "index", "change", "words"),
    [
        ("step", 0, {}, r"stages\[0\] \(small\) needs .*: take stages\[0\]\.microbatches=3$"),
        ("step", 1, {"remat": "dots"}, r"stages\[1\] \(middle\) needs .*: take model\.remat='full'$"),
        ("growth", 1, {}, r"growth small -> middle needs .*: take more devices along fsdp or tensor$"),
        ("certificate", 2, {}, r"the certificate of growth middle -> large needs .*: take more devices"),
        ("certificate", 2, {"certificate_rows": 9}, r"middle -> large needs .*: take certificate_rows=8$"),
    ],
    ids=str,
)
def test_a_compilers_refusal_names_the_program_and_its_remedy(monkeypatch, kind, index, change, words):
    """A TPU's compiler makes no program that does not fit."""

    class TooLarge:
        def lower(self, *_):
            raise RuntimeError(
                "RESOURCE_EXHAUSTED: bla: HLO temporaries (44.71G) exceeds available HBM (31.25G) by 13G\nmore"
            )

    for name in ("compile_step", "compile_growth", "comparison"):
        monkeypatch.setattr(compile_module, name, lambda *_, **__: TooLarge())
    monkeypatch.setattr(compile_module, "devices_of", lambda _: jax.devices())
    config = THREE_STAGES
    if "remat" in change:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    else:
        config = dataclasses.replace(config, **change)
    compiler = Compiler(config, parse_topology("v6e:2x4"))
    with pytest.raises(TooLargeError, match=words) as refusal:
        getattr(compiler, kind)(config.schedule[index])
    assert "needs 44.71GiB a device, of 31.25GiB, says the compiler of v6e:2x4" in str(refusal.value)


def test_remarks_name_the_stage_and_the_work_outside_the_plan():
    learned = GrowthConfig("learned", tuning_steps=7)
    model = dataclasses.replace(TINY, embed_dim=5632, head_dim=2816, vocab_size=64, dtype="bfloat16")
    stages = (StageConfig("small", growth=learned), StageConfig("large", growth=learned, embed_dim=10_240, num_heads=4))
    config = RunConfig(model=model, stages=stages)
    gpu, tpu = (list(remarks(config, MeshConfig(1, 64, 1), platform)) for platform in ("cuda", "tpu"))
    tuned, evaluations = gpu
    assert tuned.startswith("large: of 107 updates 7 tune its growth; ")
    assert "evaluations" in evaluations
    assert tpu[1:] == gpu
    assert re.match(
        r"small: over fsdp=64 a shard has 88 of 5632 rows of a matrix, not a multiple of 16: .*; "
        r"replica=2, fsdp=32 avoids it",
        tpu[0],
    )
    assert list(remarks(config, MeshConfig(2, 32, 1), "tpu")) == gpu
    single = dataclasses.replace(config, model=dataclasses.replace(model, dtype="float32"))
    assert list(remarks(single, MeshConfig(1, 64, 1), "tpu")) == gpu  # 88 rows are eleven tiles of float32


def test_json_and_page_hold_the_same_numbers(tmp_path):
    plan = plan_of(50.0, 75.0)
    path = write_plan(plan, tmp_path / "new")
    tree = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert [stage["program"]["peak"] for stage in tree["stages"]] == [50 * GiB, 75 * GiB]
    assert tree["stages"][0]["step"]["seconds"] == 10.0
    assert tree["stages"][0]["executed_flops"] == 1.1e15
    assert tree["refusals"] == list(plan.refusals)
    page = path.read_text()
    assert "stages[1] (s1) needs 75.0 GiB" in page
    assert "<script" not in page
    assert page.count("<img") == 1
    assert "<td>75.0 GiB</td>" in page


def test_every_program_has_a_bar():
    plan = plan_of(50.0, 60.0, 70.0)
    certified = dataclasses.replace(plan.growths[1], certificate=program(44.0))
    panel = plan_figure(dataclasses.replace(plan, growths=(plan.growths[0], certified)), columns=2).axes[0]
    ends = [sum(bar.get_width() for bar in pair) for pair in zip(*panel.containers, strict=True)]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert dict(zip(labels, ends, strict=True)) == {
        "step of s0": 50.0,
        "growth into s1": 20.0,
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
            r"'a900:24x8' is not a known machine; choices: .*a800:NODESx8.*v5p:4x8x8",
        ),
        (["--config.mesh.topology=a800:24x4"], "is not a known machine"),
        (["--config.mesh.topology=v5p:8x8"], "is not a known machine"),
        (["--config.mesh.topology=v6e:300x300"], "has 90000 chips; a pod of v6e has 256"),
        (["--config.mesh.topology=None"], r"mesh\.topology is None; name the machine"),
        (["--config.mesh.topology=a800:12x8"], "has 192 places for 96 devices; fsdp=8 would fill them"),
        (["--config.mesh.topology=a800:32x8"], "has 192 places for 256 devices; no mesh of 256 devices divides"),
        (
            ["--config.stages[0].batch_size=2300", "--config.stages[0].microbatches=2"],
            "batch_size=2208 or .*=2304 would",
        ),
        (["--config.stages[2].microbatches=4"], "540 does not divide .*=48; microbatches=3 would"),
        (["--config.mesh.tensor=8", "--config.mesh.fsdp=8"], "num_heads=44 .* tensor=8; tensor=4 would"),
        (["--price=-1"], "price"),
        (["--cost-only", "--config.mesh.fsdp=None"], "mesh.fsdp is None"),
        (["--cost-only", "--config.mesh.fsdp=-2"], "mesh.fsdp=-2 must be positive"),
        (["--config.mesh.replica=-3", "--config.mesh.fsdp=-16"], "mesh.replica=-3 must be positive"),
        (["--config.mesh.tensor=0"], "mesh.tensor=0 must be positive"),
        (["--cost-only", "--tflops=0"], "--tflops=0 must be a positive number"),
        (["--cost-only", "--tflops=inf"], "--tflops=inf must be"),
        (["--price=nan"], "--price=nan must be"),
        (["--tflops=100"], "--tflops=100 is read with --cost-only alone"),
        (["--search-layout", "--price=2"], "--price=2 is not read with --search-layout"),
        (["--cost-only", "--search-layout"], "--search-layout is not read with --cost-only"),
        (["--cost-only", "--output=x"], "--output is not read with --cost-only"),
        (["--cost-only", "--config.mesh.topology=v5p:4x8x8"], "--tflops=N gives"),
    ],
)
def test_a_run_that_cannot_be_planned_is_refused_in_one_line(flags, words, capsys):
    assert cli.main([*PLAN, *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            "cuDNN not found.",
            ConfigError,
            "cuDNN is missing: pip install 'flmjax[plan-gpu]', or model.attention='plain'",
        ),
        (
            "RESOURCE_EXHAUSTED: bla: HLO temporaries (1.07T) exceeds available HBM (31.25G) by 1.1T\nmore",
            TooLargeError,
            "x needs 1.07TiB a device, of 31.25GiB, says the compiler of v6e:16x16: take less",
        ),
        ("INTERNAL: line\nline two", ConfigError, "v6e:16x16: its compiler failed: INTERNAL: line line two"),
    ],
    ids=["cuDNN", "memory", "other"],
)
def test_errors_of_compilers_are_explained(error, kind, words):
    class Failing:
        def lower(self):
            raise RuntimeError(error)

    with pytest.raises(kind) as explained:
        compile_program(Failing(), (), parse_topology("v6e:16x16"), name="x", advice="take less")
    assert str(explained.value) == words


@pytest.mark.parametrize("name", ["a100:1x8", "a800:24x8", "v4:4x8x8", "v5p:4x8x8", "v5e:16x16", "v6e:16x16"])
def test_machines_have_data_sheets(name):
    topology = parse_topology(name)
    assert (topology.chip.inter_node is None) == (topology.platform == "tpu")
    assert 0.9 * topology.chip.memory < topology.usable < topology.chip.memory
    assert topology.num_devices == {"a100": 8, "a800": 192}.get(name.split(":")[0], 256)


def test_unknown_figures_of_a_chip_are_none():
    h100 = chip_of("NVIDIA H100 80GB HBM3")
    assert type(h100) is Chip
    assert (h100.memory, h100.bandwidth, h100.intra_node, h100.inter_node) == (None,) * 4
    assert chip_of("a stranger") is None


# ---- full size, compiled ---------------------------------------------------------------------------------------------


def plan_process(environment: dict[str, str], *flags: str, config: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flmjax", "plan", f"--config={ROOT}/configs/{config}", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def flm_101b(tmp_path_factory, compilers):
    """plan.json of the three stages and both growths on 192 A800s."""
    folder = tmp_path_factory.mktemp("plan")
    done = plan_process(compilers, f"--output={folder}", config="flm_101b.py")
    assert done.returncode == 0, done.stderr
    assert not re.search("^(WARNING|I0000|E0000)", done.stderr, re.MULTILINE), done.stderr
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_flm_101b_fits_192_a800s_and_gathers_no_parameter(flm_101b):
    assert flm_101b["refusals"] == []
    assert flm_101b["is_exact"]
    last = flm_101b["stages"][-1]["program"]
    assert 40 < last["peak"] / GiB <= 55
    assert all(stage["program"]["rematerialisations"] == 0 for stage in flm_101b["stages"])
    data, tensor, microbatches = 16, 4, 3
    for stage, (layers, width) in zip(flm_101b["stages"], ((40, 5632), (40, 10240), (80, 10240)), strict=True):
        sequences = stage["batch_size"] // microbatches // 48
        largest = {
            ("bf16", tensor): sequences * 2048 * width * 2,  # activations, cut along their length
            ("bf16", data): 4 * width**2 * 2 / tensor,  # one layer's largest matrix, never the stack of all layers
            ("f32", data): 100_256 * width * 4 / tensor,  # the table, which is looked up in float32
        }
        exchanges = stage["program"]["collectives"]
        assert not [x for x in exchanges if x["kind"] in ("all-to-all", "ragged-all-to-all")]
        gathers = [x for x in exchanges if x["kind"] == "all-gather"]
        assert all(x["largest"] <= largest[x["dtype"], x["group"]] for x in gathers), gathers
        gathered = {(x["dtype"], x["group"]): x["bytes"] for x in gathers}
        once = layers * 12 * width**2 * 2 / tensor * (data - 1) / data
        assert gathered["bf16", data] == pytest.approx(
            2 * microbatches * once, rel=0.06
        )  # forward and backward, and the head
        assert gathered["f32", data] <= 3.1 * largest["f32", data]
    for growth in flm_101b["growths"]:
        assert growth["program"]["rematerialisations"] == 0
        assert not [x for x in growth["program"]["collectives"] if x["kind"] == "all-gather"]
        assert growth["program"]["peak"] < 30 * GiB
    # The largest certificate, beside both states' moments: gradients that are not sharded would make it 130 GiB.
    assert 35 * GiB < flm_101b["growths"][1]["certificate"]["peak"] < 50 * GiB
    assert not [x for x in flm_101b["growths"][1]["program"]["collectives"] if x["bytes"] > 1e6]  # depth alone is local


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_search_estimates_the_memory_that_is_compiled(flm_101b):
    _, config, _, _ = cli.parse(["plan", f"--config={ROOT}/configs/flm_101b.py"])
    for stage, planned in zip(config.schedule, flm_101b["stages"], strict=True):
        sequences = stage.config.batch_size // stage.config.microbatches
        estimate = memory(stage.model, config.mesh, sequences, stage.config.microbatches)
        assert estimate == pytest.approx(planned["program"]["peak"], rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("remat", "microbatches"), [("dots", 3), ("none", 12)])
def test_the_search_estimates_what_remat_keeps(compilers, tmp_path, remat, microbatches):
    flags = [f"--config.model.remat={remat}", f"--config.stages[0].microbatches={microbatches}"]
    done = plan_process(compilers, *flags, f"--output={tmp_path}", config="flm_16b.py")
    assert done.returncode == 0, done.stderr
    compiled = json.loads((tmp_path / "plan.json").read_text())["stages"][0]["program"]["peak"]
    _, config, _, _ = cli.parse(["plan", f"--config={ROOT}/configs/flm_16b.py", *flags])
    (stage,) = config.schedule
    estimate = memory(stage.model, config.mesh, stage.config.batch_size // microbatches, microbatches)
    assert estimate == pytest.approx(compiled, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_flm_101b_is_priced_near_the_paper(flm_101b):
    assert flm_101b["total"]["days"] == pytest.approx(21.54, rel=0.15)  # a roofline, not a measurement
    assert flm_101b["saved"] == pytest.approx(0.726, abs=0.002)
    for stage in flm_101b["stages"]:
        assert stage["tflops"] == pytest.approx(stage["published"]["tflops"], rel=0.15)
        assert stage["attention"] == "cudnn"


@pytest.mark.timeout(400)
def test_a_step_that_compiles_but_does_not_fit_is_refused(compilers):
    flags = ("--config.stages[0].microbatches=1", "--config.stages[0].batch_size=9216")
    done = plan_process(compilers, *flags, config="flm_16b.py")
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"needs \d+\.\d GiB a device; A800 has 80 GiB, .*: take stages\[0\]\.microbatches=2$",
        done.stderr.strip(),
    )


@pytest.mark.timeout(400)
def test_without_its_compiler_a_machine_is_planned_on_cpus(own_environment):
    flags = ["--config.mesh.topology=a800:1x8", "--config.mesh.replica=1", "--config.mesh.fsdp=4"]
    flags += ["--config.mesh.tensor=2", "--config.model.attention=plain", "--config.stages[0].batch_size=48"]
    done = plan_process(own_environment, *flags, config="flm_proxy.py")
    assert done.returncode == 0, done.stderr
    assert "bytes, memory and times are not those of the machine" in done.stdout
    assert re.search(r"rematerialisations +0$", done.stdout, re.MULTILINE)
    assert re.search(r"fits .* unknown$", done.stdout, re.MULTILINE)
