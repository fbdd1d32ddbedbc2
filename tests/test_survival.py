"""Runs that are killed at any moment, or whose checkpoints are damaged, end as if nothing had happened.

FLMJAX_KILL_SEED chooses the moments of the random kills; the seed is printed.
"""

import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import assert_same_run, make_lab, start

import flmjax
from flmjax.workdir.checkpoint import DamagedCheckpointError
from flmjax.workdir.paths import whole_steps

GROWTH = 15  # the step of the growth in run_cases.CONFIG; checkpoints are written at 5, 10, 15, 16, 20, 25 and 30
END = 30


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the run `straight`, which was not interrupted: run_cases.make_lab."""
    return make_lab(tmp_path_factory.mktemp("lab"))


# ---- kills -----------------------------------------------------------------------------------------------------------


def moments(rng: random.Random) -> list[tuple[str, float]]:
    """Four random kills, of every kind at least one, and one inside the growth point, in the order of their steps."""
    kinds = ["batch", "saved", "saving", rng.choice(["batch", "saved", "saving"])]
    rng.shuffle(kinds)
    steps = rng.sample(range(2, END - 4), len(kinds))
    return sorted([*zip(kinds, steps, strict=True), ("growth", GROWTH + 0.5)], key=lambda moment: moment[1])


def kill_at(lab: Path, workdir: Path, kind: str, step: float) -> str:
    """Resume the run and kill it at the moment, or at the next one that it still reaches; returns the moment."""
    saved = max(whole_steps(workdir / "checkpoints"), default=0)
    next_save = saved + 5 - saved % 5
    # Kills at saves must neither skip the growth point nor come after the last save.
    is_saving = next_save < END and not (step < GROWTH + 0.5 and saved == GROWTH)
    if kind == "growth" and saved <= GROWTH:
        when = "growth"
    elif kind == "saving" and is_saving:
        when = "saving:1"
    elif kind == "saved" and is_saving:
        when = f"saved:{max(int(step), next_save + 1)}"
    else:
        when = f"batch:{max(int(step), saved + 1)}"
    start(lab, when, workdir, expect=-9)
    return when


def assert_nothing_is_left(workdir: Path) -> None:
    """Assert that no process of the run lives on, and that no half-written file is left."""
    log = f"DRIVER_LOG={workdir}.batches".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:  # it has ended since, or is another user's
            continue
        assert log not in variables or not command, command  # without a command line: ended, its parent is told
    assert [path for path in workdir.rglob("*") if "tmp" in path.name[1:]] == []


def test_five_kills_at_random_moments_lose_nothing(lab):
    seed = os.environ.get("FLMJAX_KILL_SEED", "0")
    workdir, rng = lab / "five", random.Random(seed)
    print(f"FLMJAX_KILL_SEED={seed}")
    for kind, step in moments(rng):
        print(f"killed at {kill_at(lab, workdir, kind, step)}; on disk {whole_steps(workdir / 'checkpoints')}")
    start(lab, "never", workdir)
    assert_same_run(lab / "straight", workdir)
    assert_nothing_is_left(workdir)


def test_the_old_model_stays_until_the_new_one_is_saved(lab):
    """Even where one checkpoint is kept: a kill must not find the larger model half-written and the smaller gone."""
    workdir, flags = lab / "growing", ["--config.checkpoint.keep=1", "--config.checkpoint.keep_stage_ends=False"]
    steps = lambda: whole_steps(workdir / "checkpoints")
    start(lab, "growth", workdir, *flags, expect=-9)
    assert steps() == [15]
    start(lab, "batch:16", workdir, *flags, expect=-9)  # grown, before the first update of the larger model
    assert steps() == [15]
    start(lab, "saving:1", workdir, *flags, expect=-9)  # while that update is being saved
    assert steps() in ([15], [15, 16], [16])
    start(lab, "saved:17", workdir, *flags, expect=-9)
    assert steps() == [16]
    start(lab, "never", workdir, *flags)
    assert steps() == [30]
    assert_same_run(lab / "straight", workdir)


@pytest.mark.nightly
def test_six_random_faults_lose_nothing(tmp_path):
    soak = Path(__file__).parent / "benchmarks" / "soak.py"
    line = [sys.executable, str(soak), "--faults=6", f"--folder={tmp_path}", "--seed=1"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=900)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing is lost" in result.stdout


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(lab):
    """A run that was killed at step 27: the checkpoints of steps 15, 20 and 25 are on disk."""
    start(lab, "saved:28", lab / "stopped", expect=-9)
    assert whole_steps(lab / "stopped" / "checkpoints") == [15, 20, 25]
    return lab / "stopped"


@pytest.fixture
def workdir(stopped, tmp_path):
    """A copy of `stopped`."""
    shutil.copytree(stopped, tmp_path / "run")
    shutil.copy(f"{stopped}.batches", f"{tmp_path / 'run'}.batches")
    return tmp_path / "run"


def change_byte(step: Path) -> None:
    """Change a byte in the largest file of the parameters."""
    largest = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 255
    largest.write_bytes(data)


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(lab, workdir):
    """The arrays of step 25 are damaged, and the metadata of step 20."""
    checkpoints = workdir / "checkpoints"
    change_byte(checkpoints / "25")
    meta = checkpoints / "20" / "meta" / "metadata"
    meta.write_bytes(meta.read_bytes()[:-100])
    before = contents(checkpoints / "25")
    shown = start(lab, "never", workdir).stdout
    lines = [line for line in shown.splitlines() if line.startswith("warning: checkpoint")]
    words = (
        rf"warning: checkpoint {checkpoints / '25'} cannot be read: .*; it is now 25\.unreadable, and training goes on "
        r"from step 15"
    )
    assert re.fullmatch(words, lines[0])
    assert str(checkpoints / "20") in lines[1]
    assert "20.unreadable" in lines[1]
    assert len(lines) == 2
    assert "resume at step 15" in shown
    assert contents(checkpoints / "25.unreadable") == before
    assert_same_run(lab / "straight", workdir)


def test_a_checkpoint_without_its_description_is_set_aside(lab, workdir):
    (workdir / "checkpoints" / "25" / "_CHECKPOINT_METADATA").unlink()
    shown = start(lab, "never", workdir).stdout
    assert "25 cannot be read: files are missing; it is now 25.unreadable, and training goes on from step 20" in shown
    assert_same_run(lab / "straight", workdir)


def test_a_run_without_a_readable_checkpoint_is_refused_and_unchanged(lab, workdir):
    for step in (15, 20, 25):
        change_byte(workdir / "checkpoints" / str(step))
    before = contents(workdir)
    result = start(lab, "never", workdir, expect=1)
    assert len(result.stderr.splitlines()) == 1
    assert f"no checkpoint in {workdir / 'checkpoints'} can be read (step 25: " in result.stderr
    assert "nothing was deleted or renamed" in result.stderr
    after = contents(workdir)
    for name in before:
        if name.startswith(("checkpoints", "certificates", "metrics.jsonl")):
            assert after[name] == before[name], name
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["15", "20", "25"]


def test_a_file_system_that_fails_sets_no_checkpoint_aside(lab, workdir):
    """The bytes may be there again tomorrow."""
    before = contents(workdir / "checkpoints")
    result = start(lab, "unreadable", workdir, expect=1)
    assert f"{workdir / 'checkpoints' / '25'} cannot be read now: [Errno 5] Input/output error" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert contents(workdir / "checkpoints") == before


def test_a_reader_of_a_damaged_checkpoint_renames_nothing(workdir):
    change_byte(workdir / "checkpoints" / "25")
    before = contents(workdir)
    with pytest.raises(DamagedCheckpointError, match="flmjax train sets it aside and goes on from step 20"):
        flmjax.load(workdir)
    assert flmjax.load(workdir, 20).step == 20
    assert contents(workdir) == before
