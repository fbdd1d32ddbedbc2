"""Cost of saves at 50M parameters, and of a restart after kill -9, on one CPU device.

    python tests/benchmarks/restart_cost.py [saves] [restarts] [--repeats 4]

saves: a run saves every 2 x WINDOW updates, while the next ones are made. The extra seconds of the WINDOW updates after
a save, against the WINDOW updates before the next one, are shown as the share of 100 updates: one save per 100 updates
costs that share of the throughput. The save must be complete before its window ends, which is checked.

restarts: a run is killed with kill -9 some updates after a save, and the same command goes on: seconds from the kill to
the next update that was not made before, imports included; and seconds of the work until the first update of a process
(without imports) after a restart, whose programs are stored, by those of the cold start.

Nothing is asserted: times belong to the machine they were taken on.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from flmjax.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, StageConfig
from flmjax.model.transformer import abstract_params, count_parameters
from flmjax.training import loop
from flmjax.training.start import train
from flmjax.training.step import Update
from flmjax.workdir.heartbeat import read_heartbeat
from flmjax.workdir.paths import whole_steps, write_config

MODEL = ModelConfig(num_layers=14, embed_dim=512, num_heads=8, head_dim=64, mlp_dim=2048, max_length=64)
VOCABULARY = 300  # bytes; padded
BATCH = 1
WINDOW = 20  # updates in which a save is complete
SAVED = 6  # update of the save from which a killed run goes on
KILLED_AFTER = 3  # updates after it
NEVER = 10**9


def config(folder: Path, **settings: Any) -> RunConfig:
    """Config of a run on the text in `folder`."""
    if not (folder / "text").exists():
        rng = random.Random(0)
        (folder / "text").mkdir()
        for number in range(40):  # documents enough that some are held out
            words = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz     ", k=20_000))
            (folder / "text" / f"{number}.txt").write_text(words)
    steps = settings.pop("steps")
    text = {"sources": (str(folder / "text"),), "vocabulary": "bytes", "validation_fraction": 0.2}
    data = DataConfig(**text, workers=1, directory=str(folder / "data"))
    stage = StageConfig(steps=steps, batch_size=BATCH, learning_rate=1e-4)
    common = {"evaluate_every": NEVER, "evaluation_rows": 1, "sample_tokens": 0, "log_every": 1}
    return RunConfig(model=MODEL, stages=(stage,), data=data, **common, **settings)


def saves(folder: Path, repeats: int) -> None:
    """Print the share of throughput that a save per 100 updates costs."""
    run_stage, windows = loop.run_stage, []
    checkpoints = folder / "run" / "checkpoints"

    def timed(*arguments: Any) -> Iterator[Update]:
        """Seconds of every WINDOW updates, the save at the start of every second one included."""
        start = time.perf_counter()
        for number, state, metrics in run_stage(*arguments):
            if number % WINDOW == 0:
                jax.block_until_ready(metrics)
                windows.append(time.perf_counter() - start)
                start = time.perf_counter()
                newest = number - WINDOW if number % (2 * WINDOW) else number - 2 * WINDOW
                assert newest == 0 or newest in whole_steps(checkpoints), f"the save of update {newest} is not complete"
            yield number, state, metrics

    loop.run_stage = timed
    checkpoint = CheckpointConfig(every=2 * WINDOW, keep=1)
    run = config(folder, steps=2 * WINDOW * (repeats + 1), checkpoint=checkpoint)
    with contextlib.redirect_stdout(sys.stderr):
        train(run, folder / "run")
    loop.run_stage = run_stage
    model = dataclasses.replace(MODEL, vocab_size=VOCABULARY)
    with_save, without = windows[2::2], windows[3::2]  # the first window compiles
    extra = statistics.median(a - b for a, b in zip(with_save, without, strict=True))
    step = statistics.median(without) / WINDOW
    size = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file()) / 2**20
    millions = count_parameters(abstract_params(model)[0]) / 1e6
    print(f"{millions:.0f}M parameters, {step:.3f} s a step, save of {size:.0f} MiB")
    print(f"windows with a save {shown(with_save)} s, without {shown(without)} s: a save costs {extra:.2f} s")
    print(f"one save per 100 updates costs {extra / (100 * step):.1%} of the throughput")


def shown(seconds: Sequence[float]) -> str:
    """The numbers with one digit."""
    return ", ".join(f"{value:.1f}" for value in seconds)


def restarts(folder: Path, repeats: int) -> None:
    """Print seconds and ratios of restarts."""
    cold, warm, to_new = zip(*(restart(folder, folder / f"run_{number}") for number in range(repeats)), strict=True)
    ratio = statistics.median(b / a for a, b in zip(cold, warm, strict=True))
    print(f"work to the first update: cold start {shown(cold)} s, restart {shown(warm)} s, ratio {ratio:.2f}")
    print(f"from kill -9 to the next new update, imports included: {shown(to_new)} s")


def restart(folder: Path, workdir: Path) -> tuple[float, float, float]:
    """Seconds to the first update of a cold start and of its restart, and from kill -9 to the next new update."""
    write_config(config(folder, steps=4 * SAVED, checkpoint=CheckpointConfig(every=SAVED)), workdir)

    def is_saved(step: int) -> bool:
        return step >= SAVED + KILLED_AFTER and SAVED in whole_steps(workdir / "checkpoints")

    with command(workdir) as process:
        wait_for(process, workdir, is_saved)
        cold = seconds_to_first_update(workdir)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed, made = time.perf_counter(), newest_update(workdir)
    with command(workdir) as process:
        wait_for(process, workdir, lambda step: step > made)
        to_new = time.perf_counter() - killed
        return cold, seconds_to_first_update(workdir), to_new


@contextlib.contextmanager
def command(workdir: Path) -> Iterator[subprocess.Popen]:
    """`flmjax train` in a process of its own, whose programs are stored in the workdir; killed at the end."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    line = [sys.executable, "-m", "flmjax", "train", f"--workdir={workdir}"]
    with (workdir / "log").open("ab") as log:
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def newest_update(workdir: Path) -> int:
    """The newest update in the metrics; 0 without one."""
    path = workdir / "metrics.jsonl"
    complete = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((line["step"] for line in map(json.loads, complete) if line["kind"] == "train"), default=0)


def wait_for(process: subprocess.Popen, workdir: Path, condition: Callable[[int], bool]) -> None:
    """Wait until a condition of the newest update in the metrics of the process holds."""
    while not condition(newest_update(workdir)):
        assert process.poll() is None, (workdir / "log").read_text()[-2000:]
        time.sleep(0.02)


def seconds_to_first_update(workdir: Path) -> float:
    """Seconds of the newest process until its first update was complete, imports left out."""
    beat = read_heartbeat(workdir)
    assert beat is not None
    seconds = beat["start"]["seconds"]
    return sum(seconds[work] for work in ("restoring", "compilation", "data loading", "other"))


def main() -> int:
    """Print the costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["saves", "restarts", []], help="default: both")
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    for part in (saves, restarts):
        if not arguments.parts or part.__name__ in arguments.parts:
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder), arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
