"""Growth at full size, and steps of small models, compiled for their devices on a machine without them."""

import json
import subprocess
import sys

import pytest

MESHES = {"a800:24x8": (3, 16, 4), "v5p:4x8x8": (1, 64, 4)}
DEVICE_BYTES = {"a800:24x8": 80e9, "v5p:4x8x8": 95e9}
PROGRAM = """
import dataclasses, json, sys
import jax, numpy as np
from flmjax.config import GrowthConfig, MeshConfig, ModelConfig, RunConfig, StageConfig
from flmjax.planning.compile import Compiler
from flmjax.planning.topology import parse_topology

topology, mesh, family, start, sizes = json.loads(sys.argv[1])
model = ModelConfig(head_dim=128, vocab_size=100256, max_length=2048, **start)
stages = (StageConfig("old", batch_size=192), StageConfig("new", batch_size=192, growth=GrowthConfig(), **sizes))
if family == "step":  # the last stage of configs/flm_101b.py
    model = dataclasses.replace(model, dtype="bfloat16", remat="full", attention="fused")
    stages = (stages[0], dataclasses.replace(stages[1], batch_size=2304, microbatches=3))
else:
    stages = (stages[0], dataclasses.replace(stages[1], growth=GrowthConfig(family)))
config = RunConfig(model=model, stages=stages, mesh=MeshConfig(*mesh))
compiler = Compiler(config, parse_topology(topology))
assert compiler.is_exact
stage = config.schedule[-1]
shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(compiler.spec(stage).abstract.params)]
largest = 3 * 4 * max(int(np.prod(shard)) for shard in shards)
program = compiler.step(stage) if family == "step" else compiler.growth(stage)
print("RESULT", json.dumps({**dataclasses.asdict(program), "largest_leaf": largest}))
"""
# As in configs/flm_101b.py; the paper states the last one alone.
SIZES = {
    "16B": {"num_layers": 40, "embed_dim": 5632, "num_heads": 44, "mlp_dim": 22528},
    "51B": {"num_layers": 40, "embed_dim": 10240, "num_heads": 80, "mlp_dim": 40960},
    "101B": {"num_layers": 80, "embed_dim": 10240, "num_heads": 80, "mlp_dim": 40960},
}


def compiled(compilers, topology, family, start, end):
    arguments = json.dumps([topology, MESHES[topology], family, SIZES[start], SIZES[end]])
    return result_of([PROGRAM, arguments], compilers)


def result_of(command, compilers):
    """The program that a script compiles, as JSON."""
    command = [sys.executable, "-c", *command]
    result = subprocess.run(command, env=compilers, capture_output=True, text=True, timeout=550)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stderr[-2000:]
    program = json.loads(lines[0].removeprefix("RESULT "))
    assert program["rematerialisations"] == 0
    return program


@pytest.mark.parametrize("topology", MESHES)
def test_growth_from_51b_to_101b_fits_and_moves_nothing(topology, compilers):
    """Depth alone: layers are not sharded."""
    program = compiled(compilers, topology, "zero", "51B", "101B")
    assert program["arguments"] + program["outputs"] + program["temporaries"] < DEVICE_BYTES[topology]
    assert program["temporaries"] <= 2 * program["largest_leaf"]
    assert program["collectives"] == []


# Temporaries over twice the largest leaf's shards. Masks and copies have more arrays of a leaf alive at once.
MEMORY = {"zero": 1.01, "stack": 1.01, "mask": 1.2, "duplicate": 1.5}


@pytest.mark.parametrize("family", MEMORY)
def test_growth_from_16b_to_51b_fits_192_a800s(family, compilers):
    """Width, heads and MLP: blocks move between neighbours, nothing is gathered."""
    program = compiled(compilers, "a800:24x8", family, "16B", "51B")
    assert program["arguments"] + program["outputs"] + program["temporaries"] < DEVICE_BYTES["a800:24x8"]
    assert program["temporaries"] <= MEMORY[family] * 2 * program["largest_leaf"]
    kinds = {exchange["kind"] for exchange in program["collectives"]}
    assert "all-gather" not in kinds
    moved = sum(exchange["bytes"] for exchange in program["collectives"] if exchange["kind"] == "collective-permute")
    assert 0 < moved <= 3 * program["outputs"]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_step_of_101b_fits_a_v5p_pod(compilers):
    """With splash attention, which only this compiler compiles."""
    program = compiled(compilers, "v5p:4x8x8", "step", "51B", "101B")
    assert 10 * 2**30 < program["peak"] < 40 * 2**30  # of 95
    assert not [x for x in program["collectives"] if "all-to-all" in x["kind"]]
    # A layer's 12 width^2 are multiplied with four times, but for the MLP's second product, which nothing needs again.
    by_hand = 2304 * 2048 * (80 * (2 * 4 * 12 - 2 * 4) * 10240**2 + 3 * 2 * 100_256 * 10240)
    assert program["matmul_flops"] * 256 == pytest.approx(by_hand, rel=0.01)


CERTIFICATE = """
import dataclasses, json
from flmjax.config import GrowthConfig, ModelConfig, RunConfig, StageConfig, StageMeshConfig
from flmjax.planning.compile import Compiler
from flmjax.planning.topology import parse_topology

sizes = {"num_layers": 2, "embed_dim": 256, "num_heads": 4, "head_dim": 64, "mlp_dim": 1024, "vocab_size": 4096}
model = ModelConfig(**sizes, max_length=128, dtype="bfloat16")
old = StageConfig("old", batch_size=16, mesh=StageMeshConfig(2, 2, 2))
new = StageConfig("new", batch_size=16, num_layers=4, growth=GrowthConfig(), mesh=StageMeshConfig(1, 2, 4))
config = RunConfig(model=model, stages=(old, new), certificate_rows=16)
compiler = Compiler(config, parse_topology("v5e:2x4"))
assert compiler.is_exact
print("RESULT", json.dumps(dataclasses.asdict(compiler.certificate(config.schedule[1]))))
"""


def test_a_certificate_between_meshes_gathers_no_logits(compilers):
    """Weights are gathered in bfloat16; in float32 losses are, a number a token, but no logits or log-probabilities.

    flm_101b's certificate on v6e had both of all sequences on each device: 205 GiB. A CPU's partitioner gathers no
    log-probabilities in any case.
    """
    program = result_of([CERTIFICATE], compilers)
    gathers = [x for x in program["collectives"] if x["kind"] == "all-gather" and x["dtype"] != "bf16"]
    of_one_sequence = 4 * 128 * 4096
    assert max((x["largest"] for x in gathers), default=0) < of_one_sequence / 100


# ---- FLOPs of small steps, and the options of the compilers ----------------------------------------------------------

SMALL = """
import dataclasses, json, sys
import jax
from flmjax.config import MeshConfig, ModelConfig, RunConfig, StageConfig
from flmjax.hardware import compiler_options
from flmjax.model.flops import flops_per_token
from flmjax.planning.compile import Compiler
from flmjax.planning.topology import XLA_PLATFORMS, parse_topology

for topology, mesh, attention, remat, microbatches, sizes, batch in json.loads(sys.argv[1]):
    default = {"num_layers": 2, "embed_dim": 256, "num_heads": 2, "mlp_dim": 1024, "vocab_size": 512, "max_length": 256}
    model = ModelConfig(**{**default, **sizes}, head_dim=128, dtype="bfloat16", remat=remat, attention=attention)
    stage = StageConfig(batch_size=batch, microbatches=microbatches)
    config = RunConfig(model=model, stages=(stage,), mesh=MeshConfig(*mesh))
    compiler = Compiler(config, parse_topology(topology))
    assert compiler.is_exact
    program = compiler.step(config.schedule[0])
    result = {**dataclasses.asdict(program), "model": flops_per_token(model, model.max_length)}
    print("RESULT", json.dumps(result), flush=True)
device = compiler.devices[0]
x = jax.ShapeDtypeStruct((8, 8), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
names = compiler_options(XLA_PLATFORMS[compiler.topology.platform], deterministic=True)
for name in (*names, "xla_unheard_of"):
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: True}).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        print("REFUSED", error)
assert names
"""


def small_steps(compilers, cases):
    """Programs of small steps, and the compiler's refusals of options."""
    cases = [(*case, {}, 16)[:7] if len(case) == 5 else case for case in cases]
    command = [sys.executable, "-c", SMALL, json.dumps(cases)]
    result = subprocess.run(command, env=compilers, capture_output=True, text=True, timeout=1100)
    lines = result.stdout.splitlines()
    programs = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(programs) == len(cases)
    return programs, [line for line in lines if line.startswith("REFUSED")]


def executed_by_hand(mesh, attention, remat, sizes=None, batch=16):
    """(FLOPs of matrix products, products of fused attention) of one device in a step."""
    sizes = {
        "num_layers": 2,
        "embed_dim": 256,
        "num_heads": 2,
        "mlp_dim": 1024,
        "vocab_size": 512,
        "max_length": 256,
    } | (sizes or {})
    width, heads, length = sizes["embed_dim"], 128 * sizes["num_heads"], sizes["max_length"]
    tokens = batch * length
    matrices = 2 * tokens * (4 * width * heads + 2 * width * sizes["mlp_dim"])
    scores = 2 * 2 * tokens * length * heads * 5 / 8 if attention == "plain" else 0  # later keys are left out in part
    forward = {"none": matrices + scores, "dots": matrices + 2 * scores, "full": 2 * (matrices + scores)}[remat]
    spared = 2 * tokens * width * sizes["mlp_dim"] if remat == "full" else 0  # nothing needs the MLP's second product
    layer = forward + 2 * (matrices + scores) - spared
    head = 3 * 2 * tokens * sizes["vocab_size"] * width
    flops = (sizes["num_layers"] * layer + head) / (mesh[0] * mesh[1] * mesh[2])
    kernels = 0 if attention == "plain" else (7 if remat == "none" else 9) * sizes["num_layers"]
    return flops, kernels


def check_small_steps(programs, cases):
    for program, case in zip(programs, cases, strict=True):
        mesh, attention, remat, microbatches = case[1:5]
        flops, kernels = executed_by_hand(mesh, attention, remat, *case[5:])
        assert program["matmul_flops"] == pytest.approx(flops, rel=0.02), case
        assert program["attention_products"] == kernels * microbatches, case


FIRST = {
    "gpu": [("h100:1x8", (2, 2, 2), "fused", "full", 2)],
    "tpu": [("v7x:2x2x1", (1, 4, 2), "plain", "full", 2)],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("platform", FIRST)
def test_flops_and_options_of_a_small_step(platform, compilers):
    """The compiler knows each option that steps are compiled with, and refuses others."""
    programs, refused = small_steps(compilers, FIRST[platform])
    check_small_steps(programs, FIRST[platform])
    assert len(refused) == 1
    assert "No such compile option: 'xla_unheard_of'" in refused[0]


SEVERAL = [
    ("a100:1x8", (1, 8, 1), "plain", "dots", 1),
    ("a800:2x8", (2, 4, 2), "plain", "full", 2),
    ("h200:1x8", (1, 2, 4), "fused", "none", 1, {"num_heads": 4}, 16),
    ("b200:1x8", (1, 4, 2), "fused", "dots", 2),
    ("gb200:2x4", (1, 4, 2), "fused", "full", 1),
    ("v4:2x2x2", (2, 4, 1), "plain", "none", 1),
    ("v5e:2x4", (1, 4, 2), "fused", "dots", 2),
    ("v5p:2x2x2", (1, 8, 1), "plain", "dots", 2),
    ("v6e:2x4", (2, 2, 2), "fused", "full", 1),
]


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_flops_of_small_steps_on_every_machine(compilers):
    programs, _ = small_steps(compilers, SEVERAL)
    check_small_steps(programs, SEVERAL)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_flops_of_collective_matrix_products(compilers):
    """A TPU writes products with gathered weights as loops over u32[] counters, with windowed convolutions in them.

    A plan of this model printed 212 TFLOP executed a device, of 350 that the model needs.
    """
    sizes = {"num_layers": 32, "embed_dim": 4096, "num_heads": 32, "mlp_dim": 16384, "vocab_size": 100_352}
    sizes |= {"max_length": 2048, "norm": "rmsnorm", "position": "rope", "bias": False}
    case = ("v5p:2x4x4", (1, 32, 1), "fused", "full", 1, sizes, 128)
    (program,), _ = small_steps(compilers, [case])
    check_small_steps([program], [case])
    assert program["model"] * 128 * 2048 / 32 == pytest.approx(350e12, rel=0.01)
    assert program["matmul_flops"] == pytest.approx(407e12, rel=0.01)  # and 20e12 in attention


@pytest.mark.timeout(600)
def test_between_slices_only_gradients_are_exchanged(compilers):
    """Two slices of 4 chips are the two replicas; what is gathered and scattered stays inside a slice."""
    (program,), _ = small_steps(compilers, [("v5e:2x2*2", (2, 2, 2), "fused", "full", 1)])
    across = [exchange for exchange in program["collectives"] if exchange["in_node"] < exchange["group"]]
    assert {exchange["kind"] for exchange in across} == {"all-reduce"}
    parameters = 2 * 12 * 256**2 + 512 * 256
    sent = 2 * (2 - 1) / 2 * parameters / 4  # by each device of a slice, of its share
    assert sent * 2 < sum(exchange["bytes"] for exchange in across) < 1.1 * sent * 4  # in bfloat16 or float32
