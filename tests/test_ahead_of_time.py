"""Growth at full size, compiled for the devices it is meant for, without one.

Needs their compilers: `pip install --no-deps --target DIR libtpu jax-cuda12-plugin jax-cuda12-pjrt` in the versions of
launch/constraints.txt, and FLMJAX_COMPILERS=DIR. In CI they must be there.
"""

import json
import math
import os
import re
import subprocess
import sys

import pytest

A800 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 167936
  threads_per_core_limit: 2048
  core_count: 108
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 2039000000000
  l2_cache_size: 41943040
  clock_rate_ghz: 1.41
  device_memory_size: 85899345920
  shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA A800-SXM4-80GB"
"""
TARGETS = {  # topology, mesh (replica, fsdp, tensor), bytes of a device
    "192 A800": (
        {"platform": "cuda", "topology_name": "a800", "topology": "1x24x8", "target_config": A800},
        (3, 16, 4),
    ),
    "v5p pod": ({"platform": "tpu", "topology_name": "v5p:4x8x8"}, (1, 64, 4)),
}
DEVICE_BYTES = {"192 A800": 80e9, "v5p pod": 95e9}
PROGRAM = """
import json, sys
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from flmjax.config import GrowthConfig, ModelConfig, OptimizerConfig, resize
from flmjax.growth.grow import grow
from flmjax.training.state import state_spec

topology, shape, family, start, sizes = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(**topology).devices
mesh = Mesh(np.array(devices[: int(np.prod(shape))]).reshape(shape), ("replica", "fsdp", "tensor"))
old = ModelConfig(head_dim=128, vocab_size=100256, max_length=2048, **start)
new = resize(old, family, **sizes)
before, after = (state_spec(config, OptimizerConfig(), mesh) for config in (old, new))
key = jax.eval_shape(lambda: jax.random.key(0))
program = jax.jit(
    lambda state, key: grow(state, old, new, GrowthConfig(family), key),
    in_shardings=(before.shardings, NamedSharding(mesh, PartitionSpec())),
    out_shardings=after.shardings,
)
compiled = program.lower(before.abstract, key).compile()
memory = compiled.memory_analysis()
shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(after.abstract.params)]
print("RESULT", json.dumps({
    "old": memory.argument_size_in_bytes,
    "new": memory.output_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "largest_leaf": 3 * 4 * max(int(np.prod(shard)) for shard in shards),
    "text": compiled.as_text(),
}))
"""
# Table 1 of FLM-101B: layers, width, heads; MLP 4 x width.
SIZES = {
    "16B": {"num_layers": 40, "embed_dim": 5632, "num_heads": 44, "mlp_dim": 22528},
    "51B": {"num_layers": 40, "embed_dim": 10240, "num_heads": 80, "mlp_dim": 40960},
    "101B": {"num_layers": 80, "embed_dim": 10240, "num_heads": 80, "mlp_dim": 40960},
}


def compiled_growth(target, family, start, end):
    compilers = os.environ.get("FLMJAX_COMPILERS")
    if compilers is None:
        assert os.environ.get("CI") != "true", "CI has no compilers: FLMJAX_COMPILERS is not set"
        pytest.skip(__doc__)
    # No device is looked for: the TPU's library would ask the cloud's metadata server.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = os.pathsep.join([compilers, *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = json.dumps([*TARGETS[target], family, SIZES[start], SIZES[end]])
    command = [sys.executable, "-c", PROGRAM, arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    found = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, result.stderr[-2000:]
    return json.loads(found[0].removeprefix("RESULT "))


@pytest.mark.parametrize("target", TARGETS)
def test_growth_from_51b_to_101b_fits_and_moves_nothing(target):
    """Depth alone: layers are whole on every device."""
    found = compiled_growth(target, "zero", "51B", "101B")
    assert found["old"] + found["new"] + found["temporary"] < DEVICE_BYTES[target]
    assert found["temporary"] <= 2 * found["largest_leaf"]
    assert not re.search(r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", found["text"])


# Temporaries over twice the largest leaf's shards. Masks and copies have more arrays of a leaf alive at once.
MEMORY = {"zero": 1.01, "stack": 1.01, "mask": 1.2, "duplicate": 1.5}


@pytest.mark.parametrize("family", MEMORY)
def test_growth_from_16b_to_51b_fits_192_a800s(family):
    """Width, heads and MLP: blocks move between neighbours, nothing is gathered."""
    found = compiled_growth("192 A800", family, "16B", "51B")
    assert found["old"] + found["new"] + found["temporary"] < DEVICE_BYTES["192 A800"]
    assert found["temporary"] <= MEMORY[family] * 2 * found["largest_leaf"]
    assert "all-gather" not in found["text"]
    moved = sum(
        4 * math.prod(int(n) for n in shape.split(","))
        for shape in re.findall(r"= \(?f32\[([\d,]+)\].* collective-permute(?:-start)?\(", found["text"])
    )
    assert 0 < moved <= 3 * found["new"]
