"""A run goes on with another number of processes: the same samples, the same losses, also across its growth."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from quick_xla import QUICK_XLA
from run_cases import batches, write_lab

from flmjax.workdir.metrics import read_metrics
from flmjax.workdir.paths import whole_steps

pytestmark = pytest.mark.slow

# Sizes that 4, 2 and 3 processes divide: embed_dim, which fsdp splits, and the sequences of a batch.
CONFIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=24, num_heads=2, head_dim=12, mlp_dim=48, max_length=32, dropout=0.1)
    rates = dict(steps=10, batch_size=12, learning_rate=1e-4, schedule="constant")
    small = StageConfig(name="small", **rates)
    large = StageConfig(name="large", **rates, growth=GrowthConfig("zero", rate_policy="stage"), embed_dim=48)
    return RunConfig(
        model=model, stages=(small, large), data=DataConfig(sources=(r"TEXT",), vocabulary="bytes"),
        checkpoint=CheckpointConfig(every=4), log_every=1, evaluate_every=5, evaluation_rows=12, certificate_rows=12,
        sample_tokens=0,
    )
"""
SECONDS = 240  # in which a start of several processes must end, however loaded the machine is


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the config, and the run `straight` of one process, which was not interrupted."""
    folder = tmp_path_factory.mktemp("lab")
    write_lab(folder)
    (folder / "elastic.py").write_text(CONFIG.replace("TEXT", str(folder / "text")))
    assert train(folder, "never", folder / "straight", 1)[0] == [0]
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(lab: Path, when: str, workdir: Path, processes: int) -> tuple[list[int], str]:
    """Run driver.py in several processes of one device each; returns their exit statuses and what they printed."""
    driver = Path(__file__).parent / "driver.py"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{QUICK_XLA} --xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(lab / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "DRIVER_LOG": f"{workdir}.batches",
        "PYTHONPATH": os.pathsep.join([str(driver.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if processes > 1:
        address = f"127.0.0.1:{free_port()}"
        environment |= {"FLMJAX_PROCESSES": str(processes), "JAX_COORDINATOR_ADDRESS": address, "NPROC": "16"}
    line = [sys.executable, str(driver), when, "train", f"--config={lab / 'elastic.py'}", f"--workdir={workdir}"]
    with contextlib.ExitStack() as opened:
        logs = [opened.enter_context(Path(f"{workdir}.{i}.log").open("w+")) for i in range(processes)]
        started = []
        for i, log in enumerate(logs):
            variables = {**environment, "FLMJAX_PROCESS_ID": str(i)} if processes > 1 else environment
            started.append(subprocess.Popen(line, env=variables, stdout=log, stderr=log))
            opened.callback(started[-1].kill)
        statuses = [process.wait(SECONDS) for process in started]
        return statuses, "".join(Path(log.name).read_text() for log in logs)


def losses(workdir: Path, kind: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if line["kind"] == kind}


def assert_same_trace(a: Path, b: Path) -> None:
    """Assert the same samples at every step, and losses that differ by rounding at most."""
    assert batches(a) == batches(b)
    for kind in ("train", "validation"):
        assert losses(b, kind) == pytest.approx(losses(a, kind), rel=1e-6), kind


def test_four_then_two_then_three_processes_make_the_same_run(lab):
    """fsdp=None is the number of processes. The growth, after step 10, is made by two of them."""
    workdir = lab / "elastic"
    statuses, shown = train(lab, "saved:7", workdir, 4)
    assert 0 not in statuses, shown
    assert "fsdp 4" in shown
    assert whole_steps(workdir / "checkpoints") == [4], shown
    statuses, shown = train(lab, "saved:14", workdir, 2)
    assert 0 not in statuses, shown
    assert "resume at step 4" in shown
    assert "fsdp 2" in shown
    assert whole_steps(workdir / "checkpoints")[-1] == 12
    statuses, shown = train(lab, "never", workdir, 3)
    assert statuses == [0, 0, 0], shown
    assert "resume at step 12" in shown
    assert "fsdp 3" in shown
    assert_same_trace(lab / "straight", workdir)


def test_processes_agree_that_a_checkpoint_is_damaged(lab):
    """A byte changes that the second process wrote, and with the same mesh reads: both go on from the older step."""
    workdir = lab / "damaged"
    statuses, shown = train(lab, "saved:10", workdir, 2)
    assert 0 not in statuses, shown
    step = workdir / "checkpoints" / "8"
    written = (path for path in step.rglob("*") if path.is_file() and "ocdbt.process_1" in str(path))
    largest = max(written, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 255
    largest.write_bytes(data)
    statuses, shown = train(lab, "never", workdir, 2)
    assert statuses == [0, 0], shown
    assert re.search(r"8 cannot be read: .*; it is now 8\.unreadable, and training goes on from step 4", shown)
    assert shown.count("it is now 8.unreadable") == 1  # one process alone says so
    assert (workdir / "checkpoints" / "8.unreadable").is_dir()
    assert_same_trace(lab / "straight", workdir)
