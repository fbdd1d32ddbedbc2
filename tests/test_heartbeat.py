"""The heartbeat of a run: what a watcher reads, and that it stands still with the run."""

import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from flmjax.workdir import heartbeat
from flmjax.workdir.heartbeat import BEAT_SECONDS, Heartbeat, read_heartbeat
from flmjax.workdir.starts import StartEntry, read_starts


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, in a list of one."""
    seconds = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: seconds[0])
    return seconds


def write_steps(folder, clock):
    """Steps at which the file was written, of ten steps that take a second each."""
    step = [0]
    beats = Heartbeat(folder, lambda: {"last_step": step[0]})
    beats.begin()
    written = []
    for n in range(1, 11):
        step[0], clock[0] = n, clock[0] + 1
        beats.beat()
        written.append(read_heartbeat(folder)["step"])
    return sorted(set(written))


def test_updates_write_a_beat_every_few_seconds(tmp_path, clock):
    assert BEAT_SECONDS == 5
    assert write_steps(tmp_path, clock) == [0, 5, 10]


def test_a_beat_says_what_the_process_does(tmp_path):
    entry = StartEntry(tmp_path)
    entry.begin(first_step=20)
    assert read_heartbeat(tmp_path)["state"] == "starting"
    with entry.time.during("compilation"):
        assert read_heartbeat(tmp_path)["state"] == "compiling"
    with entry.time.during("updates"):
        entry.heartbeat.note(stage="large", loss=2.5, tokens_per_second=float("inf"))
        entry.updated(27)
        with entry.time.during("checkpoints"):
            beat = read_heartbeat(tmp_path)
        assert read_heartbeat(tmp_path)["state"] == "training"
    assert {name: beat[name] for name in ("state", "step", "stage", "loss", "tokens_per_second", "pid", "host")} == {
        "state": "saving",
        "step": 27,
        "stage": "large",
        "loss": 2.5,
        "tokens_per_second": None,
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    age = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(beat["time"])
    assert 0 <= age.total_seconds() < 60


@pytest.mark.parametrize(("error", "state"), [(None, "finished"), (KeyboardInterrupt, "stopped")])
def test_the_last_beat_says_how_the_process_ended(tmp_path, error, state):
    with contextlib.suppress(KeyboardInterrupt), StartEntry(tmp_path) as entry:
        entry.begin(0)
        if error is not None:
            raise error
    assert read_heartbeat(tmp_path)["state"] == state


def test_no_beat_is_written_before_the_work_begins(tmp_path):
    """A refused command leaves no file."""
    with StartEntry(tmp_path) as entry, entry.time.during("evaluation"):
        entry.updated(1)
    assert not list(tmp_path.iterdir())


def test_a_beat_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    beats = Heartbeat(tmp_path, dict)
    beats.begin()
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("no space")))
    beats.turn("evaluation")
    assert read_heartbeat(tmp_path)["state"] == "starting"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"start": 3}', '{"time'])
def test_a_file_that_is_no_heartbeat_is_ignored(tmp_path, text):
    (tmp_path / "heartbeat.json").write_text(text)
    assert read_heartbeat(tmp_path) is None
    assert read_starts(tmp_path) == []


PROGRAM = """
import sys, time
from pathlib import Path
from flmjax.workdir import heartbeat
from flmjax.workdir.starts import StartEntry
heartbeat.BEAT_SECONDS = 0.05
entry = StartEntry(Path(sys.argv[1]))
entry.begin(0)
with entry.time.during("updates"):
    for step in range(1, 21):
        time.sleep(0.02)
        entry.updated(step)
    print("hangs", flush=True)
    time.sleep(60)
"""


def test_a_hung_process_has_no_heartbeat(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "hangs\n"
        stamp = (tmp_path / "heartbeat.json").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "heartbeat.json").stat().st_mtime_ns == stamp
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    finally:
        process.kill()
    beat = read_heartbeat(tmp_path)
    assert (beat["state"], beat["pid"]) == ("training", process.pid)
    assert beat["step"] > 10
    (entry,) = read_starts(tmp_path)  # it wrote no entry itself
    assert entry["last_step"] == beat["step"]
    assert entry["seconds"]["updates"] > 0.1


def test_the_next_start_stores_what_the_killed_one_did(tmp_path, clock):
    """The entry of its last checkpoint, at update 10, is completed up to its last heartbeat, at update 17."""
    killed = StartEntry(tmp_path)
    killed.begin(0)
    killed.write(last_step=10)
    clock[0] += BEAT_SECONDS
    killed.updated(17)
    killed.updated(18)  # between two heartbeats
    stored = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [entry["last_step"] for entry in stored] == [10]
    time.sleep(1.0)  # the date of a start has seconds
    with StartEntry(tmp_path) as entry:
        entry.begin(10)
        stored = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
        assert [entry["last_step"] for entry in stored] == [17]
        entry.write(last_step=30)
    assert [(entry["first_step"], entry["last_step"]) for entry in read_starts(tmp_path)] == [(0, 17), (10, 30)]


def test_the_end_of_a_process_is_that_of_its_entry(tmp_path):
    """Its last heartbeat is not taken for one of a killed process."""
    with StartEntry(tmp_path) as entry:
        entry.begin(0)
        entry.write(last_step=10)
    file = tmp_path / "starts.jsonl"
    lines = file.read_bytes().replace(b'"last_step": 10', b'"last_step": 11')  # newer than the heartbeat
    file.write_bytes(lines)
    with StartEntry(tmp_path) as entry:
        entry.begin(10)
    assert file.read_bytes() == lines
