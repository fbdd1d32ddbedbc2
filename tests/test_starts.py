"""starts.jsonl: the origin of every process of a run and its wall time by kind of work."""

import contextlib
import json
import subprocess
import sys
import time

import pytest

from flmjax.config import ConfigError
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.starts import StartEntry, WallTime, checkout, read_starts


def test_seconds_of_all_kinds_add_up_to_the_wall_time():
    turns = []
    start, wall = time.monotonic(), WallTime(turns.append)
    with wall.during("updates"):
        time.sleep(0.05)
        with wall.during("evaluation"):
            time.sleep(0.1)
        with contextlib.suppress(KeyboardInterrupt), wall.during("samples"):
            time.sleep(0.05)
            raise KeyboardInterrupt
    time.sleep(0.05)
    seconds, total = wall.seconds(), time.monotonic() - start
    assert sum(seconds.values()) == pytest.approx(total, abs=0.02)
    least = {"updates": 0.05, "evaluation": 0.1, "samples": 0.05, "other": 0.05}
    assert all(seconds[work] >= 0.99 * value for work, value in least.items())
    assert {work for work, value in seconds.items() if not value} == seconds.keys() - least.keys()
    assert turns == ["updates", "evaluation", "updates", "samples", "updates", "other"]


def test_every_start_keeps_its_entry(tmp_path, monkeypatch):
    """metrics.jsonl has one line per kind and step: two starts at step 0 would be one there."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/flmjax", "train", "--workdir=my run"])
    monkeypatch.setenv("SERVICE_TOKEN", "a-secret-of-the-environment")
    for step in (0, 0, 20):
        with MetricsWriter(tmp_path, step), StartEntry(tmp_path) as entry:
            entry.add(first_step=step)
            entry.write(last_step=step + 5)
            entry.add(last_step=step + 10)  # stored at the end of the block
    entries = read_starts(tmp_path)
    assert [(entry["first_step"], entry["last_step"]) for entry in entries] == [(0, 10), (0, 10), (20, 30)]
    assert entries[0]["command"] == "flmjax train '--workdir=my run'"
    assert entries[0]["versions"].keys() >= {"python", "flmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    assert (entries[0]["device"], entries[0]["devices"]) == ("cpu", 8)
    assert sum(entries[0]["seconds"].values()) > 0
    assert "secret" not in (tmp_path / "starts.jsonl").read_text()


def test_a_process_that_wrote_no_update_leaves_no_entry(tmp_path):
    with StartEntry(tmp_path) as entry:
        entry.add(first_step=0)
    assert not list(tmp_path.iterdir())


def test_a_kill_while_an_entry_is_written_keeps_the_old_file(tmp_path, monkeypatch):
    with StartEntry(tmp_path) as entry:
        entry.write(last_step=1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        StartEntry(tmp_path).write(last_step=2)
    assert [entry["last_step"] for entry in read_starts(tmp_path)] == [1]


@pytest.mark.parametrize("line", ["[]", '{"seconds": 3}', '{"date": "20'])
def test_a_line_that_is_no_entry_is_named(tmp_path, line):
    (tmp_path / "starts.jsonl").write_text(json.dumps({"date": "now"}) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=r"starts\.jsonl: line 2 is not an entry of a start.*delete that line"):
        read_starts(tmp_path)


def test_the_commit_is_that_of_a_checkout_that_tracks_the_package(tmp_path, monkeypatch):
    """A package installed in the virtual environment of another project's checkout has not that project's commit."""
    package = tmp_path / "package"
    package.mkdir()
    file = package / "__init__.py"
    file.write_text("x = 1\n")

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        line = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    assert checkout(package) == {}
    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert checkout(package) == {}
    git("add", ".")
    git("commit", "-m", "the package")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # of a hook that starts a run
    commit = checkout(package)["commit"]
    monkeypatch.delenv("GIT_DIR")
    assert commit == git("rev-parse", "HEAD")
    assert checkout(package) == {"commit": commit, "is_dirty": False}
    file.write_text("x = 2\n")
    assert checkout(package)["is_dirty"]
