"""Plans: the program that is planned is the one that trains; full-size programs fit; what does not is refused."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from matplotlib.figure import Figure

from flmjax import cli
from flmjax.config import (
    DataConfig,
    GrowthConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from flmjax.hardware import A800, GiB, chip_of
from flmjax.planning import compile as compile_module
from flmjax.planning import plan as plan_module
from flmjax.planning.compile import Compiler, Program, _explained
from flmjax.planning.cost import Bill, StageCost
from flmjax.planning.hlo import Collective
from flmjax.planning.layout_search import memory
from flmjax.planning.plan import GrowthPlan, Plan, StagePlan, _refusals, _remarks, make_plan
from flmjax.planning.roofline import Assumptions, StepTime, fused_attention_flops, step_time
from flmjax.planning.topology import TooLargeError, parse_topology
from flmjax.report.plan_page import _draw_memory, write_plan
from flmjax.report.plan_table import table
from flmjax.training import loop

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, max_length=32)


# ---- the same program ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_compiler(monkeypatch):
    """Compilers for this process's eight CPU devices; of each program they give the text that it lowers to."""
    topology = SimpleNamespace(name="cpu", num_devices=8, node=4, chip=A800)
    monkeypatch.setattr(compile_module, "devices_of", lambda _: jax.devices())
    monkeypatch.setattr(Compiler, "_compiled", lambda _, program, *arguments: program.lower(*arguments).as_text())
    return lambda config: Compiler(config, topology)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"document_attention": True},
        {"teachers": ("propositions.jsonl",), "mixture_weights": (0.5, 0.5)},
    ],
    ids=str,
)
def test_the_planned_programs_are_those_that_train(data, fake_compiler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"some text, number {i}, and more of it" for i in range(300)))
    rows = [json.dumps({"proposition": f"{i} is a number", "judgement": i % 2 == 0}) for i in range(300)]
    (tmp_path / "propositions.jsonl").write_text("\n".join(rows))
    own = GrowthConfig("mask", ramp_steps=1, rate_policy="stage")
    config = RunConfig(
        model=dataclasses.replace(TINY, dropout=0.1, remat="full"),
        stages=(
            StageConfig("small", steps=1, batch_size=8),
            StageConfig("large", steps=2, batch_size=16, microbatches=2, growth=own, num_layers=3, embed_dim=48),
        ),
        data=DataConfig(sources=("text.txt",), vocabulary="bytes", **data),
        mesh=MeshConfig(2, 2, 2),
        evaluation_rows=8,
    )
    lowered = []

    def spy(function):
        def made(*arguments):
            program = function(*arguments)

            def call(*values):
                lowered.append(program.lower(*values).as_text())
                return program(*values)

            return call

        return made

    for name in ("compile_step", "compile_growth"):
        monkeypatch.setattr(loop, name, spy(getattr(loop, name)))
    loop.train(config, tmp_path / "run")
    small, growth, masked, _ = lowered
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    compiler = fake_compiler(config)
    assert compiler.step(0) == small
    assert compiler.growth(1) == growth
    assert compiler.step(1) == masked


# ---- time by hand ----------------------------------------------------------------------------------------------------


def test_a_step_takes_what_its_parts_take_by_hand():
    model = dataclasses.replace(TINY, dtype="bfloat16", remat="full")
    assumed = Assumptions(matmul=0.5, attention=0.25, memory=0.5, link=0.5, overlap=0.5, bytes_per_token=10)
    exchanges = (
        Collective("all-gather", "bf16", 2, 1, 2, 1, 100e9, 1),  # tensor: NVLink, 200 GB/s
        Collective("all-gather", "bf16", 16, 2, 4, 1, 50e9, 1),  # four ports of 25 GB/s a node
        Collective("all-reduce", "f32", 16, 2, 1, 1, 25e9, 1),
    )
    found = step_time(
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
    assert found.compute == pytest.approx(2 + 4 + between)
    assert found.tensor == pytest.approx(1.0)
    assert found.data == pytest.approx(1.0 + 2.0)
    assert found.hidden == pytest.approx(3.0)  # less than half of what is computed
    assert found.update == pytest.approx(1.0)
    assert found.seconds == pytest.approx(2 + 4 + between + 1 + 0 + 1)


def test_weights_that_move_on_a_torus_are_hidden_and_tensor_traffic_is_not():
    chip = parse_topology("v5p:4x8x8").chip
    near = [Collective("all-gather", "bf16", *ring, ring[0], 1, chip.near, 1) for ring in ((64, 4), (4, 1))]
    found = step_time(
        dataclasses.replace(TINY, dtype="bfloat16"),
        chip,
        MeshConfig(1, 64, 4),
        tokens=0.0,
        matmul_flops=chip.bfloat16 * 100,
        attention_flops=0.0,
        state_bytes=0.0,
        collectives=near,
    )
    second = pytest.approx(1 / Assumptions().link)
    assert (found.data, found.hidden, found.tensor) == (second, second, second)


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
def test_tensor_traffic_is_that_along_the_last_axis_whatever_its_groups_size(ring, in_node, is_tensor):
    exchange = Collective("all-gather", "bf16", *ring, in_node, 1, 1e9, 1)
    found = step_time(
        TINY, A800, MeshConfig(1, 4, 4), tokens=0, matmul_flops=0, attention_flops=0, state_bytes=0,
        collectives=[exchange],
    )  # fmt: skip
    assert (found.tensor > 0, found.data > 0) == (is_tensor, not is_tensor)


def test_flops_of_fused_attention_by_hand():
    assert fused_attention_flops(dataclasses.replace(TINY, remat="none"), 10) == (2 + 5) * 2 * 32 * 32 * 10
    assert fused_attention_flops(dataclasses.replace(TINY, remat="full"), 10) == (2 * 2 + 5) * 2 * 32 * 32 * 10


# ---- what a reader sees ----------------------------------------------------------------------------------------------


def program(peak: float, **fields) -> Program:
    values = {"arguments": int(10 * GiB), "outputs": int(10 * GiB), "aliased": int(10 * GiB), "temporaries": int(GiB)}
    values |= {"peak": int(peak * GiB), "matmul_flops": 1e15, "rematerialisations": 0, "compile_seconds": 1.0}
    exchange = Collective("all-gather", "bf16", 16, 4, 2, 3, 5e9, 100)
    return Program(**{**values, "collectives": (exchange,), **fields})


def plan_of(*peaks: float, growth: float = 20.0, exact: bool = True) -> tuple[Plan, RunConfig]:
    model = dataclasses.replace(TINY, vocab_size=64, remat="full")
    stages = tuple(StageConfig(f"s{i}", steps=10, batch_size=96, microbatches=2) for i in range(len(peaks)))
    config = RunConfig(model=model, stages=stages, mesh=MeshConfig(1, 8, 1))
    bill = Bill(2.0, 384.0, None, 1.0, 0.6)
    made = [
        StagePlan(
            cost=StageCost(s.name, 1000 * (i + 1), 10, 1e9 * (i + 1), 1e21),
            batch_size=96,
            microbatches=2,
            attention="cudnn",
            program=program(peak),
            attention_flops=1e14,
            model_flops=1e17,
            step=StepTime(8.0, 1.0, 2.0, 1.5, 0.5),
            bill=bill,
            published=None,
        )
        for i, (s, peak) in enumerate(zip(stages, peaks, strict=True))
    ]
    growths = tuple(GrowthPlan(f"s{i}", f"s{i + 1}", program(growth)) for i in range(len(peaks) - 1))
    fields = {
        "topology": "a800:1x8",
        "platform": "cuda",
        "chip": A800,
        "devices": 8,
        "mesh": config.mesh,
        "is_exact": exact,
    }
    fields |= {
        "usable": 70.0 * GiB,
        "total": bill,
        "saved": 0.5,
        "saved_days": 0.4,
        "remarks": ("so it is",),
        "refusals": (),
    }
    plan = Plan(**fields, stages=tuple(made), growths=growths)
    return dataclasses.replace(plan, refusals=tuple(_refusals(plan, config))), config


def test_what_does_not_fit_is_refused_with_the_number_and_what_to_change():
    assert plan_of(70.0, 69.9)[0].refusals == ()
    plan, config = plan_of(69.0, 71.25, growth=90.0)
    assert plan.refusals == (
        "stages[1] (s1) needs 71.2 GiB a device, a A800 has 80 (70.0 for programs): take stages[1].microbatches=3",
        "growth s0 -> s1 needs 90.0 GiB a device, a A800 has 80 (70.0 for programs): take more devices along fsdp or "
        "tensor",
    )
    assert "NO" in table(plan)
    proved = dataclasses.replace(plan.growths[0], certificate=program(80.0))
    assert list(_refusals(dataclasses.replace(plan, growths=(proved,)), config))[-1].startswith(
        "the certificate of growth s0 -> s1 needs 80.0 GiB a device, a A800 has 80 (70.0 for programs): take more"
    )
    more = dataclasses.replace(config, certificate_rows=9)
    assert list(_refusals(dataclasses.replace(plan, growths=(proved,)), more))[-1].endswith("take certificate_rows=8")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="dots"))
    assert "take model.remat='full'" in next(_refusals(plan, config))
    assert plan_of(99.0, exact=False)[0].refusals == ()  # a stand-in's memory refuses nothing


def test_the_table_says_what_is_known_and_what_is_not():
    text = table(plan_of(50.0, 60.0)[0])
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line}
    assert lines["step"] == ["step", "10.0", "s", "10.0", "s"]
    assert lines["TFLOP/s a device"][-1] == f"{1e21 / 10 / 10 / 8 / 1e12:.0f}"
    assert lines["all-gather, network"][-2:] == ["5.0", "GB"]
    assert lines["dollars"] == ["dollars", "-", "-"]
    assert "saved at equal loss: not measured" in text
    assert "\nso it is\n" in f"{text}\n"
    unknown = table(plan_of(50.0, exact=False)[0])
    assert "not to be trusted" in unknown
    assert "pip install 'flmjax[plan-gpu]'" in unknown
    assert "unknown" in unknown


def test_temporaries_over_the_peak_are_explained():
    plan = plan_of(50.0, 60.0)[0]
    assert "not all alive at once" not in table(plan)
    more = dataclasses.replace(plan.growths[0], program=program(20.0, temporaries=int(21 * GiB)))
    assert "not all alive at once" in table(dataclasses.replace(plan, growths=(more,)))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (("step", 0), r"stages\[0\] \(small\) needs 44G: take stages\[0\]\.microbatches=3$"),
        (("step", 1), r"stages\[1\] \(middle\) needs 44G: take stages\[1\]\.microbatches=3$"),
        (("growth", 1), r"growth small -> middle needs 44G: take more devices along fsdp or tensor$"),
        (("certificate", 2), r"the certificate of growth middle -> large needs 44G: take more devices"),
    ],
    ids=str,
)
def test_what_a_compiler_refuses_is_named(monkeypatch, refused, words):
    class Fake:
        """Compiles everything but one program."""

        def __init__(self, config):
            self.config, self.mesh_config, self.is_exact = config, config.mesh, True
            self.topology = parse_topology("v6e:2x4")

        def attention(self, _):
            return "splash"

        def __getattr__(self, kind):
            def compiled(index):
                if (kind, index) == refused:
                    raise TooLargeError("needs 44G")
                return program(3.5, collectives=())

            return compiled

    monkeypatch.setattr(plan_module, "compiler_for", lambda _: (Fake, parse_topology("v6e:2x4")))
    learned = GrowthConfig("learned", tuning_steps=50)
    stages = tuple(
        StageConfig(name, steps=100, batch_size=96, microbatches=2, growth=learned)
        for name in ("small", "middle", "large")
    )
    model = dataclasses.replace(TINY, vocab_size=64, remat="full")
    config = RunConfig(model=model, stages=stages, mesh=MeshConfig(1, 8, 1))
    with pytest.raises(TooLargeError, match=words):
        make_plan(config, None)
    refused, lines = ("none", 0), []
    plan = make_plan(config, None, lines.append)
    assert [growth.certificate is not None for growth in plan.growths] == [False, True]
    steps = [stage.bill.days * 86_400 / stage.step.seconds for stage in plan.stages]
    assert steps == pytest.approx([100, 150, 150])  # those that tune the growth take as long
    assert lines[-4:] == ["certificate of that growth", "  3.5 GiB at most, in 1 s", "step of large", lines[1]]


def test_remarks_name_the_stage_and_what_is_not_in_the_plan():
    learned = GrowthConfig("learned", tuning_steps=7)
    model = dataclasses.replace(TINY, embed_dim=5632, head_dim=2816, vocab_size=64, dtype="bfloat16")
    stages = (StageConfig("small", growth=learned), StageConfig("large", growth=learned, embed_dim=10_240, num_heads=4))
    config = RunConfig(model=model, stages=stages)
    gpu, tpu = (list(_remarks(config, MeshConfig(1, 64, 1), platform)) for platform in ("cuda", "tpu"))
    tuned, evaluations = gpu
    assert tuned.startswith("large: of 107 updates 7 tune its growth; ")
    assert "evaluations" in evaluations
    assert tpu[1:] == gpu
    assert re.match(
        r"small: over fsdp=64 a shard has 88 of 5632 rows, no multiple of 16: .*; replica=2, fsdp=32 avoids it", tpu[0]
    )
    assert list(_remarks(config, MeshConfig(2, 32, 1), "tpu")) == gpu
    single = dataclasses.replace(config, model=dataclasses.replace(model, dtype="float32"))
    assert list(_remarks(single, MeshConfig(1, 64, 1), "tpu")) == gpu  # 88 rows are eleven tiles of float32


def test_json_and_page_hold_the_same_numbers(tmp_path):
    plan, _ = plan_of(50.0, 75.0)
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
    plan = plan_of(50.0, 60.0, 70.0)[0]
    proved = dataclasses.replace(plan.growths[1], certificate=program(44.0))
    panel = Figure().subplots()
    _draw_memory(panel, dataclasses.replace(plan, growths=(plan.growths[0], proved)))
    ends = [sum(bar.get_width() for bar in pair) for pair in zip(*panel.containers, strict=True)]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert dict(zip(labels, ends, strict=True)) == {
        "step of s0": 50.0,
        "growth into s1": 20.0,
        "step of s1": 60.0,
        "growth into s2": 20.0,
        "its certificate": 44.0,
        "step of s2": 70.0,
    }


# ---- bad input -------------------------------------------------------------------------------------------------------

PLAN = ["plan", f"--config={ROOT}/configs/flm_101b.py"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.mesh.topology=a900:24x8"], r"'a900:24x8' is no machine .*choices: .*a800:NODESx8.*v5p:4x8x8"),
        (["--config.mesh.topology=a800:24x4"], "is no machine"),
        (["--config.mesh.topology=v5p:8x8"], "is no machine"),
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
def test_what_cannot_be_planned_is_said_in_one_line(flags, words, capsys):
    assert cli.main([*PLAN, *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.strip().splitlines()) == 1


def test_errors_of_compilers_are_explained():
    a800, v6e = parse_topology("a800:24x8"), parse_topology("v6e:16x16")
    assert "pip install 'flmjax[plan-gpu]', or model.attention='plain'" in str(
        _explained(RuntimeError("cuDNN not found."), a800)
    )
    error = RuntimeError(
        "RESOURCE_EXHAUSTED: bla: HLO temporaries (44.71G) exceeds available HBM (31.25G) by 13G\nmore"
    )
    found = _explained(error, v6e)
    assert isinstance(found, TooLargeError)
    assert "needs 1.07TiB" in str(_explained(RuntimeError(str(error).replace("44.71G", "1.07T")), v6e))
    assert str(found) == "needs 44.71GiB a device, of 31.25GiB, says the compiler of v6e:16x16"
    text = str(_explained(RuntimeError("INTERNAL: line\nline two"), v6e))
    assert text == "v6e:16x16: its compiler failed: INTERNAL: line line two"


@pytest.mark.parametrize("name", ["a100:1x8", "a800:24x8", "v4:4x8x8", "v5p:4x8x8", "v5e:16x16", "v6e:16x16"])
def test_machines_have_data_sheets(name):
    topology = parse_topology(name)
    assert topology.chip.memory > 0
    assert topology.chip.near > 0
    assert topology.chip.bandwidth > 0
    assert chip_of("a stranger") is None
    assert topology.num_devices == {"a100": 8, "a800": 192}.get(name.split(":")[0], 256)


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
def test_flm_101b_fits_192_a800s_and_gathers_no_parameter_whole(flm_101b):
    assert flm_101b["refusals"] == []
    assert flm_101b["is_exact"]
    last = flm_101b["stages"][-1]["program"]
    assert 40 < last["peak"] / GiB <= 55
    assert all(stage["program"]["rematerialisations"] == 0 for stage in flm_101b["stages"])
    data, tensor, microbatches = 16, 4, 3
    for stage, (layers, width) in zip(flm_101b["stages"], ((40, 5632), (40, 10240), (80, 10240)), strict=True):
        rows = stage["batch_size"] // microbatches // 48
        largest = {
            ("bf16", tensor): rows * 2048 * width * 2,  # activations, cut along their length
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
    # The largest certificate, beside both states' moments: gradients kept whole would make it 130 GiB.
    assert 35 * GiB < flm_101b["growths"][1]["certificate"]["peak"] < 50 * GiB
    assert not [x for x in flm_101b["growths"][1]["program"]["collectives"] if x["bytes"] > 1e6]  # depth alone is local


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_search_estimates_the_memory_that_is_compiled(flm_101b):
    _, config, _, _ = cli.parse(["plan", f"--config={ROOT}/configs/flm_101b.py"])
    for stage, model, planned in zip(config.stages, config.stage_models, flm_101b["stages"], strict=True):
        rows = stage.batch_size // stage.microbatches
        estimate = memory(model, config.mesh, rows, stage.microbatches)
        assert estimate == pytest.approx(planned["program"]["peak"], rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("remat", "microbatches"), [("dots", 3), ("none", 12)])
def test_the_search_estimates_what_remat_keeps(compilers, tmp_path, remat, microbatches):
    flags = [f"--config.model.remat={remat}", f"--config.stages[0].microbatches={microbatches}"]
    done = plan_process(compilers, *flags, f"--output={tmp_path}", config="flm_101b.py:16b")
    assert done.returncode == 0, done.stderr
    compiled = json.loads((tmp_path / "plan.json").read_text())["stages"][0]["program"]["peak"]
    _, config, _, _ = cli.parse(["plan", f"--config={ROOT}/configs/flm_101b.py:16b", *flags])
    estimate = memory(config.stage_models[0], config.mesh, config.stages[0].batch_size // microbatches, microbatches)
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
def test_a_step_too_large_for_the_card_is_refused_although_its_compiler_takes_it(compilers):
    flags = ("--config.stages[0].microbatches=1", "--config.stages[0].batch_size=9216")
    done = plan_process(compilers, *flags, config="flm_101b.py:16b")
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"needs \d+\.\d GiB a device, a A800 has 80 .*: take stages\[0\]\.microbatches=2$", done.stderr.strip()
    )


@pytest.mark.timeout(400)
def test_without_the_machines_compiler_cpu_devices_stand_in_and_it_is_said(own_environment):
    flags = ["--config.mesh.topology=a800:1x8", "--config.mesh.replica=1", "--config.mesh.fsdp=4"]
    flags += ["--config.mesh.tensor=2", "--config.model.attention=plain", "--config.stages[0].batch_size=48"]
    done = plan_process(own_environment, *flags, config="flm_proxy.py")
    assert done.returncode == 0, done.stderr
    assert "not to be trusted" in done.stdout
    assert re.search(r"rematerialisations +0$", done.stdout, re.MULTILINE)
    assert re.search(r"fits .* unknown$", done.stdout, re.MULTILINE)
