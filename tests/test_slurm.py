"""The launch file of Slurm on a real Slurm, with two simulated nodes: runs are stopped, killed and resumed.

What ends a start is chosen in two ways: `flmjax train` is real and the test kills its processes, or a script of the
test stands in its place (`stand_in`), which ends as it should and takes no time.
"""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from quick_xla import QUICK_XLA
from slurm_cluster import SlurmCluster, missing_programs

from flmjax import cli
from flmjax.workdir.metrics import read_metrics

STEPS = 60
CONFIG = f"""
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=32, dropout=0.1)
    stage = StageConfig(steps={STEPS}, batch_size=32, microbatches=2, learning_rate=3e-3, schedule="constant")
    return RunConfig(
        model=model, stages=(stage,), data=DataConfig(sources=("text",), vocabulary="bytes", validation_fraction=0.2),
        mesh=MeshConfig(topology="a800:2x8"), checkpoint=CheckpointConfig(every=10), log_every=1,
        evaluate_every={STEPS}, evaluation_rows=16, sample_tokens=0,
    )
"""
DEVICES = "--xla_force_host_platform_device_count"


class Job(NamedTuple):
    """A job of the cluster.

    Attributes:
        folder: where it was submitted.
        workdir: of its run.
    """

    cluster: SlurmCluster
    number: str
    folder: Path
    workdir: Path

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    @property
    def output(self) -> str:
        (file,) = [*self.folder.glob(f"*.{self.number}.out")] or [Path(os.devnull)]
        return file.read_text(errors="replace")

    def until(self, condition, seconds: float, claim: str):
        try:
            return self.cluster.until(condition, seconds, claim)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output[-4000:]}") from None

    def ends(self, state: str, seconds: float = 120) -> None:
        """Wait for the end of the job, and assert how it ends."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert self.until(lambda: self.state in ends and self.state, seconds, "the job ends") == state, self.output

    def losses(self) -> dict[int, float]:
        """The loss of every step, with the last value of those that were repeated."""
        return {line["step"]: line["loss"] for line in read_metrics(self.workdir) if line["kind"] == "train"}

    def starts(self) -> list[tuple[int, int, int]]:
        """(processes, devices, step that it goes on from) of every start."""
        lines = (self.workdir / "starts.jsonl").read_text().splitlines()
        return [(line["processes"], line["devices"], line["first_step"]) for line in map(json.loads, lines)]

    def reaches(self, step: int) -> None:
        """Wait until an update has been logged."""
        metrics = self.workdir / "metrics.jsonl"
        line = f'"step": {step},'
        self.until(lambda: metrics.exists() and line in metrics.read_text(), 90, f"step {step} of {metrics}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := missing_programs():
        text = f"there is no {', '.join(missing)}: apt-get install slurm-wlm munge"
        assert os.environ.get("CI") != "true", text
        pytest.skip(text)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of texts."""
    folder = tmp_path_factory.mktemp("texts") / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(f"w{i * j * j % 89}" for j in range(400)))
    return folder


def submit(cluster, folder, text, *options: str, devices: int = 2, stand_in: str = "") -> Job:
    """Submit the launch file of a run, with these options of sbatch.

    Args:
        devices: CPU devices of each process.
        stand_in: lines of a shell script in place of flmjax; "": flmjax itself.
    """
    (folder / "config.py").write_text(CONFIG)
    if not (folder / "text").exists():
        (folder / "text").symlink_to(text)
    programs = Path(sys.executable).parent
    if stand_in:
        programs = folder / "programs"
        programs.mkdir()
        (programs / "flmjax").write_text(f"#!/bin/bash\n{stand_in}\n")
        (programs / "flmjax").chmod(0o755)
    source = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    (folder / "site.toml").write_text(
        f"""
setup = ["export PATH={programs}:$PATH"]
[env]
PYTHONPATH = "{source}"
JAX_PLATFORMS = "cpu"
NPROC = "8"
XLA_FLAGS = "{QUICK_XLA} {DEVICES}={devices}"
JAX_COMPILATION_CACHE_DIR = "{text.parent}/cache"
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = "0"
[slurm]
partition = "main"
"""
    )
    workdir, file = folder / "run", folder / "run.sbatch"
    launch = ["launch", "slurm", f"--config={folder}/config.py", f"--workdir={workdir}", f"--site={folder}/site.toml"]
    assert cli.main([*launch, f"--output={file}"]) == 0
    number = cluster.run("sbatch", "--parsable", *options, str(file), cwd=folder).strip()
    return Job(cluster, number, folder, workdir)


@pytest.fixture(scope="module")
def plain(cluster, text, tmp_path_factory):
    """A run that nothing interrupts, of one process a node with two devices each."""
    job = submit(cluster, tmp_path_factory.mktemp("plain"), text)
    job.ends("COMPLETED")
    return job


@pytest.mark.slow
def test_a_run_trains_on_two_nodes(plain):
    assert sorted(plain.losses()) == list(range(1, STEPS + 1))
    assert plain.losses()[STEPS] < plain.losses()[1]
    assert (plain.restarts, plain.starts()) == (0, [(2, 4, 0)])
    assert not list(plain.folder.glob("*.crashes"))


@pytest.mark.slow
def test_four_tasks_on_two_nodes_make_the_same_run(plain, cluster, text, tmp_path):
    """Four processes with a device each are the mesh of two processes with two: the losses differ by rounding alone."""
    job = submit(cluster, tmp_path, text, "--ntasks-per-node=2", "--gpus-per-node=2", devices=1)
    job.ends("COMPLETED", 180)
    assert job.starts() == [(4, 4, 0)]
    assert job.losses() == pytest.approx(plain.losses(), rel=1e-5)


@pytest.mark.slow
def test_sigterm_saves_and_the_requeued_run_is_exact(plain, cluster, text, tmp_path):
    job = submit(cluster, tmp_path, text)
    job.reaches(15)
    cluster.run("scancel", "--signal=TERM", job.number)
    job.until(lambda: "saved; queued again" in job.output, 60, "exit status 75")
    job.until(lambda: job.restarts == 1, 30, "the job is queued again")
    job.ends("COMPLETED")
    assert job.losses() == plain.losses()
    (stopped,) = re.findall(r"stopped at step (\d+)", job.output)
    assert job.starts() == [(2, 4, 0), (2, 4, int(stopped))]  # no step was repeated
    assert "crash" not in job.output


@pytest.mark.slow
def test_a_killed_task_is_a_crash_and_the_run_goes_on(plain, cluster, text, tmp_path):
    job = submit(cluster, tmp_path, text)
    job.reaches(15)
    os.kill(job.until(lambda: cluster.task(job.number, 1), 10, "task 1 runs"), signal.SIGKILL)
    job.until(lambda: job.restarts == 1, 60, "the job is queued again")
    job.ends("COMPLETED")
    assert job.losses() == plain.losses()
    (checkpoint,) = re.findall(r"crash 1 of 3 in a row at checkpoint (\d+); queued again", job.output)
    assert job.starts() == [(2, 4, 0), (2, 4, int(checkpoint))]
    assert int(checkpoint) >= 10


@pytest.mark.slow
def test_a_lost_node_is_waited_for_and_the_run_goes_on(plain, cluster, text, tmp_path):
    job = submit(cluster, tmp_path, text)
    job.reaches(15)
    cluster.kill_node("node1")
    job.until(lambda: job.restarts == 1, 90, "the job is queued again")
    cluster.start_node("node1")
    job.ends("COMPLETED")
    assert job.losses() == plain.losses()
    assert job.starts()[1][2] >= 10


@pytest.mark.slow
def test_crashes_in_a_row_end_at_the_cap(cluster, text, tmp_path):
    job = submit(cluster, tmp_path, text, stand_in="exit 1")
    job.ends("FAILED", 60)
    assert job.restarts == 2
    assert re.findall(r"crash (\d) of 3", job.output) == ["1", "2", "3"]
    assert "crash 3 of 3 in a row at checkpoint 0; not queued again" in job.output


@pytest.mark.slow
def test_a_crash_is_not_hidden_by_a_task_that_saves(cluster, text, tmp_path):
    """One task fails; srun ends the other by SIGTERM, on which it saves and ends with 75, the larger status."""
    task = "trap 'echo saves; exit 75' TERM; for _ in {1..600}; do sleep 0.1; done"
    job = submit(cluster, tmp_path, text, stand_in=f"if [ $SLURM_PROCID = 1 ]; then sleep 2; exit 1; fi; {task}")
    job.until(lambda: "queued again" in job.output, 60, "the job is queued again")
    cluster.run("scancel", job.number)
    assert "saves" in job.output
    assert "exit status 1, crash 1 of 3 in a row at checkpoint 0; queued again" in job.output


@pytest.mark.nightly
def test_the_time_limit_saves_and_queues_the_job_again(cluster, text, tmp_path):
    """Slurm sends SIGTERM up to a minute earlier than it is asked to."""
    first = "trap 'exit 75' TERM; for _ in {1..1800}; do sleep 0.1; done; exit 1"
    again = 'if [ "${SLURM_RESTART_COUNT:-0}" = 1 ]; then exit 0; fi'
    job = submit(cluster, tmp_path, text, "--time=2", "--signal=TERM@60", stand_in=f"{again}; {first}")
    job.ends("COMPLETED", 180)
    assert job.restarts == 1
    assert "saved; queued again" in job.output
    assert "crash" not in job.output


@pytest.mark.slow
def test_a_wrong_command_is_not_queued_again(cluster, text, tmp_path):
    """One task refuses at once, the other three seconds later; srun would have killed it and reported that."""
    job = submit(cluster, tmp_path, text, stand_in='sleep $((SLURM_PROCID * 3)); echo "flmjax: no" >&2; exit 2')
    job.ends("FAILED", 60)
    assert (job.restarts, cluster.job(job.number)["ExitCode"]) == (0, "2:0")
    assert "exit status 2: the command or the config is wrong; not queued again" in job.output


@pytest.mark.slow
def test_a_cancelled_job_does_not_come_back(cluster, text, tmp_path):
    """The run saves on the SIGTERM of scancel, and ends with the status that is otherwise queued again."""
    start = "trap 'sleep 1; exit 75' TERM; echo started; for _ in {1..600}; do sleep 0.1; done"
    job = submit(cluster, tmp_path, text, stand_in=start)
    job.until(lambda: job.output.count("started") == 2, 30, "both tasks run")
    cluster.run("scancel", job.number)
    job.until(lambda: cluster.states() == ["idle"] * 2, 60, "the nodes are free")
    job.ends("CANCELLED")
    assert job.restarts == 0
