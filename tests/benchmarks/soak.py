"""One run under random faults, started again after each, compared with a run that nothing happened to.

    python tests/benchmarks/soak.py [--faults 50] [--seed 0] [--folder DIR]

A fault comes a random number of updates after the last, or while the process starts. Kinds: kill -9, SIGTERM, SIGSTOP
and then kill -9, a full disk (RLIMIT_FSIZE), and after kill -9 a changed byte or a removed file in the newest
checkpoint. Every loss that was ever written must be, bit for bit, that of the undisturbed run, and so must the growth.
The exit status is 1 if anything was lost.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flmjax.text_table import text_table
from flmjax.workdir.metrics import METRICS_FILE, read_metrics
from flmjax.workdir.paths import whole_steps

ROOT = Path(__file__).parents[2]
KINDS = ("kill -9", "SIGTERM", "SIGSTOP, kill -9", "full disk", "changed byte", "removed file")
EARLY = 0.25  # share of the faults that come while the process starts
START_SECONDS = 6.0  # in which those come
PATIENCE = 120.0  # seconds without a new update after which the run is said to hang
TIMES = ("tokens_per_second", "model_flops_utilization", "seconds")  # of a line of metrics, not the same in every run

CONFIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=128, max_length=64, dropout=0.1)
    small = StageConfig(name="small", steps=STEPS, batch_size=8, learning_rate=1e-3, schedule="constant")
    zero = GrowthConfig("zero")
    large = StageConfig(name="large", steps=STEPS, batch_size=8, growth=zero, embed_dim=96, num_layers=3)
    return RunConfig(
        model=model, stages=(small, large), data=DataConfig(sources=(r"TEXT",), vocabulary="bytes"),
        checkpoint=CheckpointConfig(every=20, keep=3), log_every=1, evaluate_every=100, evaluation_rows=8,
        sample_tokens=8,
    )
"""


@dataclasses.dataclass
class Fault:
    """A fault, and how the run recovered from it and from those that followed before the next new update.

    Attributes:
        kind: one of KINDS.
        time: when it came, in seconds of the clock.
        repeated: updates that were made again; None: another fault came before the next new one.
        seconds: until the next new update; None as `repeated`.
    """

    kind: str
    time: float
    repeated: int | None = None
    seconds: float | None = None


class LostError(Exception):
    """Something of the run was lost; the message says what."""


class Soak:
    """The disturbed run.

    Args:
        folder: with config.py; the workdir is `folder`/soaked.
        rng: chooses the faults and their moments.
        faults: their number.
        updates: of the run.
    """

    def __init__(self, folder: Path, rng: random.Random, faults: int, updates: int) -> None:
        self.folder, self.rng, self.number = folder, rng, faults
        self.workdir = folder / "soaked"
        self.checkpoints = self.workdir / "checkpoints"
        self.gap = updates // faults
        self.kinds: list[str] = []  # those that come next; every kind comes equally often
        self.faults: list[Fault] = []
        self.waiting: list[Fault] = []  # those since the newest update
        self.losses: dict[int, set[float]] = {}
        self.reached = 0  # the newest update in the metrics of any process
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start the run again and again until all faults came, then until it ends."""
        while len(self.faults) < self.number:
            self._start()
            if self.rng.random() < EARLY:
                due = time.monotonic() + self.rng.uniform(0, START_SECONDS)
                is_alive = self._wait(lambda due=due: time.monotonic() >= due)
            else:
                target = self.reached + self.rng.randint(1, self.gap)
                is_alive = self._wait(lambda target=target: self.reached >= target)
                time.sleep(self.rng.uniform(0, 0.1))
            if not is_alive:
                break
            self._strike()
        if self.process is None:
            self._start()
        self._wait(lambda: False)

    def _start(self) -> None:
        self.process = start(self.folder, self.workdir)

    def _wait(self, is_due: Any) -> bool:
        """Watch the run until `is_due`, or until it ends: then False."""
        assert self.process is not None
        since = time.monotonic()
        while not is_due():
            self._follow()
            status = self.process.poll()
            if status is not None:
                self._follow()
                if status != 0:
                    raise LostError(f"the run ended with status {status}:\n{log_of(self.workdir)[-2000:]}")
                self.process = None
                return False
            if self.waiting and time.monotonic() - since > PATIENCE:
                raise LostError(f"no new update in {PATIENCE:.0f} s:\n{log_of(self.workdir)[-2000:]}")
            time.sleep(0.02)
        return True

    def _follow(self) -> None:
        """Read the newest update; the first new one after a fault ends the recovery from it."""
        step = newest_update(self.workdir)
        if step <= self.reached:
            return
        if self.waiting:
            resumed = re.findall(r"resume at step (\d+)", log_of(self.workdir))
            self.waiting[0].repeated = self.reached - (int(resumed[-1]) if resumed else 0)
            self.waiting[0].seconds = time.monotonic() - self.waiting[0].time
            self.waiting.clear()
        self.reached = step

    def _strike(self) -> None:
        """Bring a fault over the process, and read what it had written."""
        assert self.process is not None
        kind = self._choose()
        when = time.monotonic()
        if kind == "SIGTERM":
            self.process.send_signal(signal.SIGTERM)
        elif kind == "SIGSTOP, kill -9":
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(self.rng.uniform(0, 1))
            self.process.kill()
        elif kind == "full disk":
            size = (self.workdir / METRICS_FILE).stat().st_size if (self.workdir / METRICS_FILE).exists() else 0
            limit = size + self.rng.randrange(100_000)
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        else:
            self.process.kill()
        self._end(30)
        if kind in KINDS[4:]:
            damage(self.checkpoints / str(whole_steps(self.checkpoints)[-1]), kind, self.rng)
        self._follow()
        self.faults.append(Fault(kind, when))
        self.waiting.append(self.faults[-1])
        for line in read_metrics(self.workdir):
            if line["kind"] == "train":
                self.losses.setdefault(line["step"], set()).add(line["loss"])
        print(
            f"{len(self.faults)}: {kind} at update {self.reached}; on disk {whole_steps(self.checkpoints)}", flush=True
        )

    def _choose(self) -> str:
        """The next kind; one that damages a checkpoint needs an older one that is whole, and changes places if not."""
        if not self.kinds:
            self.kinds = self.rng.sample(KINDS, len(KINDS))
        is_safe = len(whole_steps(self.checkpoints)) > 1 and not self.waiting
        kind = next((kind for kind in self.kinds if is_safe or kind not in KINDS[4:]), None)
        if kind is None:
            return KINDS[0]
        self.kinds.remove(kind)
        return kind

    def _end(self, seconds: float) -> None:
        """Wait until the process has ended, kill it where it does not, and look for children that it left."""
        assert self.process is not None
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:  # a full disk that nothing was written to
            self.process.kill()
            self.process.wait()
        if orphans := members_of(self.process.pid):
            raise LostError(f"processes {orphans} live on after their run")
        self.process = None

    def close(self) -> None:
        """End the process if it still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def start(folder: Path, workdir: Path) -> "subprocess.Popen[bytes]":
    """`flmjax train` as the first process of a session; its output is added to WORKDIR.log."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    line = [sys.executable, "-m", "flmjax", "train", f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
    with Path(f"{workdir}.log").open("ab") as log:
        return subprocess.Popen(line, env=environment, stdout=log, stderr=log, start_new_session=True)


def log_of(workdir: Path) -> str:
    """What the processes of a run printed."""
    return Path(f"{workdir}.log").read_text(errors="replace")


def newest_update(workdir: Path) -> int:
    """The last update in the metrics of a run that may be writing them."""
    try:
        with (workdir / METRICS_FILE).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 20_000, 0))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    steps = [int(found[1]) for line in lines if (found := re.match(rb'\{"kind": "train", "step": (\d+),', line))]
    return max(steps, default=0)


def members_of(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended since
            continue
        if int(of_session) == session and state != "Z":
            members.append(int(entry.parent.name))
    return members


def damage(step: Path, kind: str, rng: random.Random) -> None:
    """Change a byte in a file of a checkpoint, or remove a file; large files are taken more often."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    path = rng.choices(files, [1 + path.stat().st_size for path in files])[0]
    if kind == "removed file":
        path.unlink()
    elif data := bytearray(path.read_bytes()):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def check(soak: Soak, undisturbed: Path) -> None:
    """Raise LostError where the disturbed run differs from the undisturbed one, or left something behind."""
    expected, lines = (
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(workdir)]
        for workdir in (undisturbed, soak.workdir)
    )
    if expected != lines:
        first = next((i for i, pair in enumerate(zip(expected, lines, strict=False)) if pair[0] != pair[1]), -1)
        raise LostError(f"metrics differ from line {first + 1}: {json.dumps(lines[first : first + 1])}")
    losses = {line["step"]: line["loss"] for line in expected if line["kind"] == "train"}
    if wrong := [step for step, values in soak.losses.items() if values != {losses[step]}]:
        raise LostError(f"updates {wrong[:5]} had another loss before a fault")
    if left := [path for path in soak.workdir.rglob("*") if "tmp" in path.name[1:]]:
        raise LostError(f"half-written files are left: {', '.join(map(str, left[:3]))}")


def table(faults: list[Fault]) -> str:
    """Faults by kind, with the updates that they cost and the seconds until the next new one."""
    rows = [["fault", "number", "updates repeated", "most", "seconds to the next new update", "most"]]
    for kind in (*KINDS, "all"):
        of_kind = [fault for fault in faults if kind in (fault.kind, "all")]
        recovered = [fault for fault in of_kind if fault.seconds is not None]
        if recovered:
            repeated, seconds = ([getattr(x, name) for x in recovered] for name in ("repeated", "seconds"))
            cells = [statistics.median(repeated), max(repeated), statistics.median(seconds), max(seconds)]
            shown = [f"{cells[0]:.0f}", f"{cells[1]}", f"{cells[2]:.1f}", f"{cells[3]:.1f}"]
        else:
            shown = ["", "", "", ""]
        rows.append([kind, str(len(of_kind)), *shown])
    return text_table(rows)


def write_inputs(folder: Path, updates: int) -> None:
    """Write a text of random words, and the config of a run of two stages."""
    rng = random.Random(0)
    words = [f"w{rng.randrange(1000)}" for _ in range(200)]
    (folder / "text").mkdir(parents=True)
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(300)))
    text = CONFIG.replace("STEPS", str(updates // 2)).replace("TEXT", str(folder / "text"))
    (folder / "config.py").write_text(text)


def main() -> int:
    """Run undisturbed, run under faults, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new folder that is kept; default: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="flmjax-soak-"))
    updates = 100 * arguments.faults
    write_inputs(folder, updates)
    print(f"seed {arguments.seed}, {arguments.faults} faults, {updates} updates in {folder}", flush=True)
    began = time.monotonic()
    if start(folder, folder / "undisturbed").wait() != 0:
        print(log_of(folder / "undisturbed"))
        return 1
    print(f"the undisturbed run took {time.monotonic() - began:.0f} s", flush=True)
    soak = Soak(folder, random.Random(arguments.seed), arguments.faults, updates)
    try:
        soak.run()
        check(soak, folder / "undisturbed")
    except LostError as error:
        print(f"LOST: {error}")
        return 1
    finally:
        soak.close()
    print(table(soak.faults))
    aside = len(list(soak.checkpoints.glob("*.unreadable*")))
    seconds = time.monotonic() - began
    print(f"{len(soak.faults)} faults, {aside} checkpoints set aside, {seconds:.0f} s; nothing is lost: every loss is")
    print("that of the undisturbed run, bit for bit")
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
