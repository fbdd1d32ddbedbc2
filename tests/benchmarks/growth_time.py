"""Time to grow a 50M state to 150M on the CPU, against copying the grown state once.

    python tests/benchmarks/growth_time.py [--repeats 7] [--families zero,duplicate,...]

The state is parameters and both moments, float32. One round grows by each family and copies once, so that what else the
machine does hits all alike. Nothing is asserted: times belong to the machine they were taken on.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flmjax.config import GROWTH_FAMILIES, GrowthConfig, MeshShape, ModelConfig, OptimizerConfig, resize
from flmjax.growth.grow import grow
from flmjax.growth.growth import Growth
from flmjax.model.transformer import count_parameters
from flmjax.sharding.mesh import make_mesh
from flmjax.training.state import init_state, state_spec

SMALL = ModelConfig(num_layers=8, embed_dim=640, num_heads=10, head_dim=64, mlp_dim=2560, vocab_size=16384)
LARGE = {"num_layers": 14, "embed_dim": 896, "num_heads": 14, "mlp_dim": 3584}


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--families", default=",".join(GROWTH_FAMILIES))
    arguments = parser.parse_args()
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    state = init_state(state_spec(SMALL, OptimizerConfig(), mesh), 0)
    key = jax.random.key(1)

    def grower(family: str) -> Callable[..., Any]:
        operator, new = GrowthConfig(family), resize(SMALL, family, **LARGE)
        return jax.jit(lambda state, key: grow(state, Growth(SMALL, new, operator, key)))

    growers = {family: grower(family) for family in arguments.families.split(",")}
    grown = growers[next(iter(growers))](state, key)
    before, after = count_parameters(state.params), count_parameters(grown.params)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    times: dict[str, list[float]] = {name: [] for name in ("copy", *growers)}
    for repeat in range(arguments.repeats + 1):  # the first compiles
        times["copy"].append(timed(copy, grown))
        for family, function in growers.items():
            times[family].append(timed(function, state, key))
        if repeat == 0:
            times = {name: [] for name in times}
    print(f"{before / 1e6:.0f}M -> {after / 1e6:.0f}M parameters, {arguments.repeats} rounds, {jax.devices()[0]}")
    print(f"{'family':12} {'seconds':>8} {'by copy':>8} {'paired':>7}")
    copies = times.pop("copy")
    print(f"{'copy':12} {statistics.median(copies):8.3f} {1:8.2f} {1:7.2f}")
    for family, seconds in times.items():
        paired = statistics.median(a / b for a, b in zip(seconds, copies, strict=True))
        ratio = statistics.median(seconds) / statistics.median(copies)
        print(f"{family:12} {statistics.median(seconds):8.3f} {ratio:8.2f} {paired:7.2f}")
    print("by copy: of medians; paired: median of ratios by round")


if __name__ == "__main__":
    main()
