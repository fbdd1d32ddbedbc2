"""Runs in several processes on this machine, and what tests do to them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from quick_xla import QUICK_XLA

from flmjax.workdir.metrics import read_metrics

TIMEOUT = 150
DRIVER = Path(__file__).parent / "process_driver.py"
LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
CONFIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(
        num_layers=1, embed_dim=32, num_heads=4, head_dim=8, mlp_dim=48, max_length=32, dropout=0.1
    )
    small = StageConfig(name="small", steps=8, batch_size=8, learning_rate=3e-3, schedule="constant")
    large = StageConfig(name="large", steps=8, batch_size=8, microbatches=2, embed_dim=48, num_layers=2)
    return RunConfig(
        model=model, stages=(small, large), data=DataConfig(sources=(r"TEXT",), vocabulary="bytes"),
        checkpoint=CheckpointConfig(every=5, keep=9), log_every=1, evaluate_every=4, evaluation_rows=8, sample_tokens=4,
        certificate_float64_below=0, peak_flops=1e9,
        distributed=DistributedConfig(heartbeat_seconds=10, shutdown_seconds=30),
    )
"""
TIMELY = ("tokens_per_second", "model_flops_utilization", "seconds")


def write_lab(folder: Path) -> Path:
    """Write text and config.py into a folder; returns it."""
    (folder / "text").mkdir(parents=True)
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(f"w{i * k % 97}" for k in range(200)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text")))
    return folder


def environment(lab: Path, **variables: str) -> dict[str, str]:
    """Environment of a process of a run on one device of the CPU, with the compile cache of the lab."""
    root = str(Path(__file__).parents[1])
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("FLMJAX_P", "SLURM", "JAX_COORD"))}
    return {
        **kept,
        "XLA_FLAGS": QUICK_XLA,
        "JAX_COMPILATION_CACHE_DIR": str(lab / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "8",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        **variables,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(lab: Path, workdir: Path, when: str, *flags: str) -> list[str]:
    """`flmjax train` of the lab's config by process_driver.py."""
    start = [sys.executable, str(DRIVER), when, "train", f"--config={lab / 'config.py'}", f"--workdir={workdir}"]
    return [*start, *flags]


class Ended(NamedTuple):
    """A process that has ended: exit status, standard output and error, and the seconds that it took."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """Lines of standard error that flmjax has written."""
        return [line for line in self.err.splitlines() if line.startswith("flmjax: ")]


class Running:
    """Processes of a run, each with its own command line.

    Args:
        commands: a command line for each process.
        variables: environment of all; FLMJAX_PROCESSES and its companions are added for several processes.
    """

    def __init__(self, lab: Path, commands: Sequence[list[str]], **variables: str) -> None:
        address, self.began = f"127.0.0.1:{free_port()}", time.monotonic()
        self.folder = lab / f"output-{time.monotonic_ns()}"
        self.folder.mkdir()
        self.processes = []
        for i, line in enumerate(commands):
            several = {"FLMJAX_PROCESSES": str(len(commands)), "FLMJAX_PROCESS_ID": str(i)}
            several = {**several, "JAX_COORDINATOR_ADDRESS": address} if len(commands) > 1 else {}
            with self.file(i, "out").open("w") as out, self.file(i, "err").open("w") as err:
                self.processes.append(
                    subprocess.Popen(
                        line,
                        env=environment(lab, **{**several, **variables}),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                )

    def file(self, process: int, stream: str) -> Path:
        """The file of a process's standard output ("out") or error ("err")."""
        return self.folder / f"{process}.{stream}"

    def wait_for(self, text: str, process: int = 0) -> None:
        """Wait until a process has printed a text."""
        until = time.monotonic() + TIMEOUT
        while text not in (shown := self.file(process, "out").read_text()):
            errors = [self.file(i, "err").read_text() for i in range(len(self.processes))]
            assert self.processes[process].poll() is None, shown + "".join(errors)
            assert time.monotonic() < until, shown + "".join(errors)
            time.sleep(0.02)

    def send(self, process: int, number: int) -> None:
        self.processes[process].send_signal(number)
        self.began = time.monotonic()

    def ended(self, *skipped: int) -> list[Ended]:
        """The processes once they have ended; those `skipped` are killed then. Seconds count from the last signal."""
        results = []
        for i, process in enumerate(self.processes):
            if i in skipped:
                continue
            process.wait(timeout=TIMEOUT)
            seconds = time.monotonic() - self.began
            results.append(Ended(process.returncode, *(self.file(i, x).read_text() for x in ("out", "err")), seconds))
        return results

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def running(lab: Path, *commands: list[str], **variables: str) -> Iterator[Running]:
    """Processes that run these commands, killed at the end of the block."""
    run = Running(lab, commands, **variables)
    try:
        yield run
    finally:
        run.kill()


def train(
    lab: Path, workdir: Path, *flags: str, processes: int = 2, when: str = "never", **variables: str
) -> list[Ended]:
    """A run of the lab's config to its end."""
    with running(lab, *[command(lab, workdir, when, *flags)] * processes, **variables) as run:
        return run.ended()


def statuses(results: Sequence[Ended]) -> list[int]:
    return [result.status for result in results]


def left_over(workdir: Path) -> list[str]:
    """Command lines of processes that still work on a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if f"--workdir={workdir} " in f"{line} "]


def timeless(workdir: Path) -> list[dict]:
    """The lines of metrics without times, in the order of steps and kinds."""
    lines = [{k: v for k, v in line.items() if k not in TIMELY} for line in read_metrics(workdir)]
    return sorted(lines, key=lambda line: (line["step"], line["kind"]))


def assert_close(a: Path, b: Path, relative: float) -> None:
    """Assert that two runs have the same lines of metrics, with numbers that differ by rounding alone."""
    lines = timeless(a), timeless(b)
    assert [(line["kind"], line["step"]) for line in lines[0]] == [(line["kind"], line["step"]) for line in lines[1]]
    for x, y in zip(*lines, strict=True):
        if x["kind"] in ("train", "validation"):
            assert abs(x["loss"] - y["loss"]) <= relative * abs(y["loss"]), (x, y)
