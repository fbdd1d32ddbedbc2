"""Plans of full-size runs: they fit, and the numbers are near the paper's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_configs import module

from flmjax import cli
from flmjax.config.validate import validate_meshes
from flmjax.hardware import GiB
from flmjax.planning.layout_search import memory

ROOT = Path(__file__).parents[1]


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
    assert all(stage["program"]["rematerialisations"] == 0 for stage in flm_101b["stages"])
    peaks = [stage["program"]["peak"] / GiB for stage in flm_101b["stages"]]
    assert peaks == pytest.approx([57.7, 65.7, 51.8], rel=0.03)
    for stage, (layers, width) in zip(flm_101b["stages"], ((40, 5632), (40, 10240), (80, 10240)), strict=True):
        replica, data, tensor = (stage["mesh"][axis] for axis in ("replica", "fsdp", "tensor"))
        sequences = stage["batch_size"] // stage["microbatches"] // (replica * data)
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
            2 * stage["microbatches"] * once, rel=0.06
        )  # forward and backward, and the head
        assert gathered["f32", data] <= (stage["microbatches"] + 1) * largest["f32", data]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_growths_of_flm_101b_move_at_most_the_new_state(flm_101b):
    for growth in flm_101b["growths"]:
        exchanges = growth["program"]["collectives"]
        assert growth["program"]["rematerialisations"] == 0
        assert not [x for x in exchanges if x["kind"] == "all-gather"]
        assert sum(x["bytes"] for x in exchanges) < 1.1 * growth["program"]["outputs"]
        assert growth["program"]["peak"] < 35 * GiB
    # Beside both states' moments; gradients that are not sharded would make the second 130 GiB.
    peaks = [growth["certificate"]["peak"] / GiB for growth in flm_101b["growths"]]
    assert peaks == pytest.approx([27.1, 51.1], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_search_estimates_the_memory_that_is_compiled(flm_101b):
    _, config, _, _ = cli.parse(["plan", f"--config={ROOT}/configs/flm_101b.py"])
    meshes = validate_meshes(config, 192)
    for stage, mesh, planned in zip(config.schedule, meshes, flm_101b["stages"], strict=True):
        sequences = stage.config.batch_size // stage.config.microbatches
        estimate = memory(stage.model, mesh, sequences, stage.config.microbatches)
        assert estimate == pytest.approx(planned["program"]["peak"], rel=0.1)


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("remat", "microbatches"), [("dots", 3), ("none", 12)])
def test_the_search_estimates_what_remat_keeps(compilers, tmp_path, remat, microbatches):
    flags = [f"--config.stages[0].remat={remat}", f"--config.stages[0].microbatches={microbatches}"]
    done = plan_process(compilers, *flags, f"--output={tmp_path}", config="flm_101b.py:16b")
    assert done.returncode == 0, done.stderr
    compiled = json.loads((tmp_path / "plan.json").read_text())["stages"][0]["program"]["peak"]
    _, config, _, _ = cli.parse(["plan", f"--config={ROOT}/configs/flm_101b.py:16b", *flags])
    (stage,), (mesh,) = config.schedule, validate_meshes(config, 192)
    estimate = memory(stage.model, mesh, stage.config.batch_size // microbatches, microbatches)
    assert estimate == pytest.approx(compiled, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_flm_101b_takes_fewer_days_than_the_papers(flm_101b):
    """A roofline, not a measurement; the layouts are not the paper's, which are not published."""
    assert flm_101b["total"]["days"] == pytest.approx(17.8, rel=0.03)
    assert flm_101b["saved"] == pytest.approx(0.726, abs=0.002)
    for stage in flm_101b["stages"]:
        assert 0.9 < stage["tflops"] / stage["published"]["tflops"] < 1.35
        assert stage["attention"] == "cudnn"


EVALUATIONS = """
import sys
from flmjax import cli
from flmjax.planning.compile import Compiler
from flmjax.planning.topology import parse_topology

_, config, _, _ = cli.parse(["plan", f"--config={sys.argv[1]}"])
topology = parse_topology(config.mesh.topology)
compiler = Compiler(config, topology)
assert compiler.is_exact
for stage in config.schedule:
    print("REFUSAL", compiler.evaluation(stage).refusal(topology.chip, topology.usable))
"""


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "machine"), [(name, machine) for name in ("flm_101b", "growth_7b") for machine in module(name).MACHINES]
)
def test_the_evaluation_of_every_stage_fits_its_machine(name, machine, compilers):
    command = [sys.executable, "-c", EVALUATIONS, f"{ROOT}/configs/{name}.py:{machine}"]
    done = subprocess.run(command, env=compilers, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("REFUSAL")] == ["REFUSAL None"] * 3


@pytest.mark.timeout(400)
def test_a_step_that_compiles_but_does_not_fit_is_refused(compilers):
    flags = ("--config.stages[0].microbatches=1", "--config.stages[0].batch_size=9216")
    done = plan_process(compilers, *flags, config="flm_101b.py:16b")
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"needs \d+\.\d GiB a device; A800 has 80 GiB, .*: take stages\[0\]\.remat='full'$",
        done.stderr,
        re.MULTILINE,
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("topology", "attention"), [("a800:1x8", "cudnn"), ("v5e:2x4", "splash")])
def test_a_plan_is_compiled_for_the_machine(topology, attention, compilers, tmp_path):
    """A step with fused attention; .ci/run plans it on the newest JAX too."""
    mesh = ["--config.mesh.replica=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    size = ["--config.model.num_layers=2", "--config.stages[0].batch_size=48"]
    flags = [f"--config.mesh.topology={topology}", *mesh, *size, f"--output={tmp_path}"]
    done = plan_process(compilers, *flags, config="flm_proxy.py")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["is_exact"]
    assert plan["refusals"] == []
    (stage,) = plan["stages"]
    assert stage["attention"] == attention
    assert 0 < stage["program"]["peak"] < 4 * GiB
    assert stage["program"]["rematerialisations"] == 0


@pytest.mark.timeout(400)
def test_without_its_compiler_a_machine_is_planned_on_cpus(own_environment):
    flags = ["--config.mesh.topology=a800:1x8", "--config.mesh.replica=1", "--config.mesh.fsdp=4"]
    flags += ["--config.mesh.tensor=2", "--config.model.attention=plain", "--config.stages[0].batch_size=48"]
    done = plan_process(own_environment, *flags, config="flm_proxy.py")
    assert done.returncode == 0, done.stderr
    assert "bytes, memory and times are not those of the machine" in done.stdout
    assert re.search(r"rematerialisations +0$", done.stdout, re.MULTILINE)
    assert re.search(r"fits .* unknown$", done.stdout, re.MULTILINE)
