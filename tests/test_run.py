"""Whole runs in processes of their own: killed, resumed, starved of disk. A kill costs its last interval at most."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flmjax.training.checkpoint import Checkpoints
from flmjax.training.metrics import read_metrics

CONFIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=32, dropout=0.1)
    both = dict(steps=15, learning_rate=3e-3)
    small = StageConfig(name="small", batch_size=4, schedule="constant", **both)
    large = StageConfig(name="large", batch_size=6, microbatches=2, embed_dim=48, num_layers=2, **both)
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


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with text, a config, a compile cache, and one run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("lab")
    rng = random.Random(0)
    words = [f"w{rng.randrange(1000)}" for _ in range(200)]
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(300)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text")))
    start(folder, "never", folder / "straight")
    return folder


def start(lab: Path, when: str, workdir: Path, *flags: str, expect: int = 0) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(lab / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "DRIVER_LOG": str(workdir) + ".batches",
    }
    driver = Path(__file__).parent / "driver.py"
    command = [sys.executable, str(driver), when, "train", f"--config={lab / 'config.py'}", f"--workdir={workdir}"]
    result = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def batches(workdir: Path) -> dict[int, set[str]]:
    """Checksums of the tokens that each step ever saw."""
    seen: dict[int, set[str]] = {}
    for line in Path(str(workdir) + ".batches").read_text().splitlines():
        step, checksum = line.split()
        seen.setdefault(int(step), set()).add(checksum)
    return seen


def same_run(a: Path, b: Path) -> None:
    """Bitwise equal parameters and moments, the same samples at every step, the same metrics but for times."""
    sums = []
    for workdir in (a, b):
        with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
            assert checkpoints.latest_step() == 30
            sums.append(checkpoints.meta(30)["bit_sums"])
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


def test_a_run_writes_what_it_promises(lab):
    straight = lab / "straight"
    assert sorted(p.name for p in straight.iterdir() if not p.name.startswith(".")) == [
        "certificates", "checkpoints", "config.json", "data", "loss.png", "metrics.jsonl", "report.html", "tensorboard",
    ]  # fmt: skip
    certificate = json.loads((straight / "certificates" / "step_00000015.json").read_text())
    assert certificate["max_difference"]["float32"] <= 1e-4
    assert certificate["max_difference"]["float64"] <= 1e-10
    lines = read_metrics(straight)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 31))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 15, 20, 30]
    assert [line["stage"] for line in lines if line["kind"] == "sample"] == ["small", "large"]
    assert [line["tokens"] for line in lines if line["kind"] == "train"][-1] == 15 * 4 * 32 + 15 * 6 * 32
    assert len(batches(straight)) == 30
    assert len(set.union(*batches(straight).values())) == 30  # no batch came twice


def test_kill_between_saves_loses_nothing(lab):  # case A01
    workdir = lab / "killed"
    start(lab, "batch:12", workdir, expect=-9)  # the first 11 steps are done, step 10 is saved
    # Step 10 was being written when the kill came: whole or not there.
    assert re.search(r"go on from step (5|10):", start(lab, "never", workdir).stdout)
    same_run(lab / "straight", workdir)


def test_kill_inside_the_growth_point_loses_nothing(lab):
    workdir = lab / "killed_growing"
    start(lab, "growth", workdir, expect=-9)
    assert not (workdir / "certificates").exists()
    assert "go on from step 15" in start(lab, "never", workdir).stdout
    same_run(lab / "straight", workdir)


def test_kill_while_saving_and_an_empty_folder_cost_one_interval(lab):  # case H02
    workdir = lab / "killed_saving"
    start(lab, "saving:2", workdir, expect=-9)
    (workdir / "checkpoints" / "12").mkdir()  # Orbax alone would take it for the newest
    result = start(lab, "never", workdir)
    assert "go on from step 5" in result.stdout or "go on from step 10" in result.stdout
    assert f"removed {workdir / 'checkpoints' / '12'}: not a complete checkpoint" in result.stderr
    same_run(lab / "straight", workdir)
    assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]


def test_full_disk_stops_the_run_and_spares_the_last_checkpoint(lab):  # case H03
    workdir = lab / "full"
    result = start(lab, "full:2", workdir, expect=1)
    assert "saving in" in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 600
    assert len(batches(workdir)) <= 15  # within one interval of the second save, at step 10
    assert "go on from step 5" in start(lab, "never", workdir).stdout
    same_run(lab / "straight", workdir)


def test_gradients_that_stay_nan_stop_the_run_and_spare_the_last_checkpoint(lab):  # case D04
    workdir = lab / "nan"
    result = start(lab, "nan:8", workdir, "--config.optimizer.max_nonfinite_updates=3", expect=1)
    assert "step 10: update skipped, not finite: embedding" in result.stderr
    assert "(3 in a row); stopped, parameters are those of step 7" in result.stderr
    assert max(batches(workdir)) <= 11  # one more update was on its way
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 5


def test_damaged_checkpoint_is_named_and_the_one_before_it_works(lab):
    workdir = lab / "damaged"
    shutil.copytree(lab / "straight", workdir)
    shutil.copy(str(lab / "straight") + ".batches", str(workdir) + ".batches")
    step = workdir / "checkpoints" / "30"
    largest = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 255
    largest.write_bytes(data)
    result = start(lab, "never", workdir, expect=1)
    assert f"{step} cannot be read" in result.stderr
    assert "delete that folder to go on from step 25" in result.stderr
    shutil.rmtree(step)
    start(lab, "never", workdir)
    same_run(lab / "straight", workdir)


def test_a_finished_run_is_left_as_it_is_by_the_same_command(lab):
    before = (lab / "straight" / "metrics.jsonl").read_text()
    assert "report" in start(lab, "never", lab / "straight").stdout
    assert (lab / "straight" / "metrics.jsonl").read_text() == before


def test_workdir_of_another_config_is_refused_with_the_fields(lab):
    result = start(lab, "never", lab / "straight", "--config.model.mlp_dim=64", "--config.stages[1].steps=20", expect=2)
    assert "model.mlp_dim: 48 -> 64; stages[1].steps: 15 -> 20" in result.stderr


def test_what_only_says_how_to_run_may_change(lab):
    flags = ("--config.stages[1].microbatches=3", "--config.log_every=5", "--config.model.remat=full")
    start(lab, "never", lab / "straight", *flags)


def test_learning_rate_and_seed_compile_nothing_anew(lab):  # case I06
    flags = ("--config.seed=5", "--config.stages[0].learning_rate=1e-3")
    cached = {p.name for p in (lab / "cache").iterdir()}
    start(lab, "never", lab / "reseeded", *flags)
    new = {p.name for p in (lab / "cache").iterdir()} - cached
    assert not [name for name in new if "train_step" in name or "grow" in name], new


def test_log_of_a_run_is_plain_lines(lab):
    result = start(lab, "batch:3", lab / "log", expect=-9)
    assert "\r" not in result.stdout + result.stderr
    assert "\x1b" not in result.stdout + result.stderr
