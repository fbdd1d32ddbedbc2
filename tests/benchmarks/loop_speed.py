"""Tokens/s of the loop of `flmjax train` over tokens/s of its bare jitted step, on one CPU device.

    python tests/benchmarks/loop_speed.py [--rounds 20] [--steps 100] [--apart MILLISECONDS] [--profile]

One run trains a model whose step takes some milliseconds, with lines of metrics every ten steps and without saves and
evaluations. After every --steps updates of the loop the same number of bare steps, with one batch and their own state,
run in the same process, so that what else the machine does hits both alike. The ratio is the median over rounds of the
bare seconds by the loop's. Nothing is asserted: times belong to the machine they were taken on.

On a CPU the step and the loop share cores: each millisecond of the loop's Python is taken from the step where the step
uses all cores. With --apart a small step also waits so long without a core, as the host sees the step of a GPU or TPU.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import pstats
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flmjax.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, StageConfig
from flmjax.config.run import Stage
from flmjax.training import loop
from flmjax.training.start import train
from flmjax.training.state import StateSpec, TrainState, init_state
from flmjax.training.step import Update

MODEL = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=256, max_length=256)
APART_MODEL = dataclasses.replace(MODEL, num_layers=1, embed_dim=16, num_heads=1, mlp_dim=16, max_length=64)
BATCH = 2
NEVER = 10**9
PROFILED_LINES = 35


class Rounds:
    """Seconds of `steps` updates of the loop, and of as many bare steps, in every round.

    Args:
        profile: collects the calls of the loop's part.
    """

    def __init__(self, steps: int, profile: cProfile.Profile | None) -> None:
        self.steps, self.profile = steps, profile
        self.of_loop: list[float] = []
        self.of_bare: list[float] = []

    def run_stage(
        self,
        state: TrainState,
        spec: StateSpec,
        stage: Stage,
        rate: Any,
        batches: Iterator[dict[str, Any]],
        *others: Any,
    ) -> Iterator[Update]:
        """loop.run_stage with a pause for bare steps after every round; the first round compiles."""
        batch: dict[str, Any] = {}

        def kept(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for placed in batches:
                batch.update({} if batch else placed)
                yield placed

        step, bare_state = loop.jit_stage_step(spec, stage.layout, None), init_state(spec, 1)
        updates = run_stage(state, spec, stage, rate, kept(batches), *others)
        start = time.perf_counter()
        for number, state, metrics in updates:
            yield number, state, metrics
            if number % self.steps:
                continue
            if self.profile is not None:
                self.profile.disable()
            jax.block_until_ready(metrics)
            self.of_loop.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(self.steps):
                bare_state, metrics = step(bare_state, batch, np.float32(1e-3))
            jax.block_until_ready(metrics)
            self.of_bare.append(time.perf_counter() - start)
            if self.profile is not None and len(self.of_loop) > 1:
                self.profile.enable()
            start = time.perf_counter()


run_stage = loop.run_stage
make_step = loop.jit_stage_step


def step_apart(seconds: float) -> Callable[..., Any]:
    """The function jit_stage_step for steps that wait without a core, each before the next one begins."""

    def wait(count: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return count

    def make(*arguments: Any) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        step = make_step(*arguments)

        def waiting(*values: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            state, metrics = step(*values)
            skipped = state.skipped_updates
            waited = jax.pure_callback(wait, jax.ShapeDtypeStruct(skipped.shape, skipped.dtype), skipped)
            metrics = {**metrics, "loss": metrics["loss"] + 0 * waited}
            return dataclasses.replace(state, skipped_updates=waited), metrics

        return jax.jit(waiting, donate_argnums=0)

    return make


def config(folder: Path, steps: int, model: ModelConfig) -> RunConfig:
    """The config of the run, and its text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(" ".join(rng.choices(words, k=20_000)))
    stage = StageConfig(steps=steps, batch_size=BATCH, learning_rate=1e-3, warmup_steps=10)
    return RunConfig(
        model=model,
        stages=(stage,),
        data=DataConfig(sources=(str(folder / "text"),), vocabulary="bytes", workers=1),
        checkpoint=CheckpointConfig(every=NEVER),
        evaluate_every=NEVER,
        evaluation_rows=8,
        sample_tokens=0,
    )


def main() -> int:
    """Print the times and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="of a round")
    parser.add_argument("--apart", type=float, metavar="MILLISECONDS", help="the step waits so long without a core")
    parser.add_argument("--profile", action="store_true", help="print the calls of the loop that take longest")
    arguments = parser.parse_args()
    rounds = Rounds(arguments.steps, cProfile.Profile() if arguments.profile else None)
    loop.run_stage, model = rounds.run_stage, MODEL
    if arguments.apart is not None:
        loop.jit_stage_step, model = step_apart(arguments.apart / 1000), APART_MODEL
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train(config(Path(folder), (arguments.rounds + 1) * arguments.steps, model), Path(folder) / "run")
    of_loop, of_bare = rounds.of_loop[1:], rounds.of_bare[1:]
    ratios = sorted(bare / ours for ours, bare in zip(of_loop, of_bare, strict=True))
    tokens = arguments.steps * BATCH * model.max_length
    print(f"{len(ratios)} rounds of {arguments.steps} steps of {BATCH * model.max_length} tokens, {jax.devices()[0]}")
    for name, seconds in (("bare step", of_bare), ("flmjax train", of_loop)):
        median = statistics.median(seconds)
        print(f"{name:13}{1000 * median / arguments.steps:8.2f} ms{tokens / median:10,.0f} tokens/s")
    quarter = len(ratios) // 4
    spread = f"half of the rounds within {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}"
    print(f"ratio of tokens/s, median over rounds: {statistics.median(ratios):.3f} ({spread})")
    if rounds.profile is not None:
        pstats.Stats(rounds.profile).sort_stats("tottime").print_stats(PROFILED_LINES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
