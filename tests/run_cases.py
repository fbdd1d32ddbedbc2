"""Configs of small runs, and the process that trains or grows them."""

import os
import random
import subprocess
import sys
from pathlib import Path

from quick_xla import QUICK_XLA

from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import read_metrics

CONFIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=32, dropout=0.1)
    small = StageConfig(name="small", steps=15, batch_size=4, learning_rate=3e-3, schedule="constant")
    mask = GrowthConfig("mask", ramp_steps=8)
    large = StageConfig(
        name="large", steps=15, batch_size=6, microbatches=2, growth=mask, embed_dim=48, num_layers=2
    )
    return to_config_dict(RunConfig(
        model=model,
        stages=(small, large),
        data=DataConfig(sources=(r"TEXT",), vocabulary="bytes"),
        checkpoint=CheckpointConfig(every=5, keep=2),
        log_every=1,
        evaluate_every=10,
        evaluation_rows=8,
        sample_tokens=8,
    ))
"""
LAYOUTS = """
from flmjax.config import *

def get_config():
    model = ModelConfig(
        num_layers=1, embed_dim=32, num_heads=4, head_dim=8, mlp_dim=64, max_length=32, remat="full", dropout=0.1
    )
    rates = dict(steps=10, batch_size=8, learning_rate=1e-4, schedule="constant")
    of_stage = GrowthConfig("zero", rate_policy="stage")
    stages = (
        StageConfig(name="small", **rates, mesh=StageMeshConfig(replica=1, tensor=1)),
        StageConfig(
            name="wide", **rates, growth=of_stage, embed_dim=48, mlp_dim=96, microbatches=2, remat="dots",
            mesh=StageMeshConfig(replica=2, tensor=2),
        ),
        StageConfig(name="deep", **rates, growth=of_stage, num_layers=3, mesh=StageMeshConfig(tensor=4), remat="none"),
    )
    return RunConfig(
        model=model, stages=stages, data=DataConfig(sources=(r"TEXT",), vocabulary="bytes"),
        checkpoint=CheckpointConfig(every=5), log_every=1, evaluate_every=5, evaluation_rows=8, certificate_rows=8,
        sample_tokens=8,
    )
"""
BIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(
        num_layers=3, embed_dim=60, num_heads=4, head_dim=20, mlp_dim=80, max_length=40, dropout=0.1,
        norm_eps=1e-5 * 32 / 60, rotary_dim=16,
    )
    stage = StageConfig(name="big", steps=4, batch_size=4, learning_rate=1e-4, schedule="constant")
    data = DataConfig(sources=(r"TEXT",), vocabulary="bytes")
    return to_config_dict(RunConfig(model=model, stages=(stage,), data=data, log_every=1, evaluation_rows=8))
"""
ALTERNATING = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=64)
    stage = StageConfig(name="judge", steps=8, batch_size=4, learning_rate=1e-3, schedule="constant")
    data = DataConfig(
        sources=(r"TEXT",), teachers=(r"PROPOSITIONS",), vocabulary="bytes", mixture_weights=(0.5, 0.5),
        teacher_mixing="alternating",
    )
    return to_config_dict(RunConfig(model=model, stages=(stage,), data=data, log_every=1, evaluation_rows=8))
"""
APART = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=64)
    english = StageConfig(
        name="english", steps=20, batch_size=4, learning_rate=1e-2, schedule="constant",
        mixture_weights=(1.0, 0.0, 0.5, 0.5),
    )
    both = StageConfig(name="both", steps=5, batch_size=4, mixture_weights=(1.0, 1.0, 0.5, 0.5))
    data = DataConfig(
        sources=(r"LAB/en.txt", r"LAB/zh.txt"), teachers=(r"LAB/en_judged.jsonl", r"LAB/zh_judged.jsonl"),
        vocabulary="bytes",
    )
    return to_config_dict(RunConfig(
        model=model, stages=(english, both), data=data, log_every=10, evaluation_rows=8
    ))
"""


def make_lab(folder: Path) -> Path:
    """A folder with text, configs, a compile cache, and the run `straight`, which was not interrupted."""
    write_lab(folder)
    start(folder, "never", folder / "straight")
    return folder


def write_lab(folder: Path) -> None:
    """Write the text and the configs of make_lab."""
    rng = random.Random(0)
    words = [f"w{rng.randrange(1000)}" for _ in range(200)]
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(300)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text")))
    (folder / "big.py").write_text(BIG.replace("TEXT", str(folder / "text")))
    (folder / "layouts.py").write_text(LAYOUTS.replace("TEXT", str(folder / "text")))


def start(
    lab: Path,
    when: str,
    workdir: Path | str,
    *flags: str,
    expect: int = 0,
    command: str = "train",
    config: str | None = "config.py",
    devices: int = 1,
    log: Path | None = None,
) -> subprocess.CompletedProcess:
    """Run `flmjax COMMAND --config --workdir FLAGS` by driver.py in a process, and assert its exit status.

    Args:
        lab: folder with the config and the compile cache.
        when: the point at which the process dies; see driver.py.
        expect: exit status.
        log: file of the batches; None: beside the workdir.
    """
    driver = Path(__file__).parent / "driver.py"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{QUICK_XLA} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(lab / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "DRIVER_LOG": str(log or f"{workdir}.batches"),
        "PYTHONPATH": os.pathsep.join([str(driver.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    file = [] if config is None else [f"--config={lab / config}"]
    line = [sys.executable, str(driver), when, command, *file, f"--workdir={workdir}", *flags]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def batches(workdir: Path) -> dict[int, set[str]]:
    """{step: checksums of its batches}, from DRIVER_LOG; a repeated step has one if its batch was the same."""
    seen: dict[int, set[str]] = {}
    for line in Path(str(workdir) + ".batches").read_text().splitlines():
        step, checksum = line.split()
        seen.setdefault(int(step), set()).add(checksum)
    return seen


def assert_same_run(a: Path, b: Path) -> None:
    """Assert equal bits of parameters and moments, equal samples at every step, and equal metrics except times."""
    sums = []
    for workdir in (a, b):
        with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
            assert checkpoints.latest_step() == 30
            sums.append(checkpoints.meta(30)["checksums"])
    assert sums[0] == sums[1]
    assert batches(a) == batches(b)
    timeless = [
        [
            {k: v for k, v in line.items() if k not in ("tokens_per_second", "model_flops_utilization", "seconds")}
            for line in lines
        ]
        for lines in (read_metrics(a), read_metrics(b))
    ]
    assert timeless[0] == timeless[1]
