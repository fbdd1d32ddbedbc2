"""The lock of a workdir or data folder, with and without flock, between processes that live, end and die."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flmjax import cli, lock
from flmjax.config import ConfigError
from flmjax.lock import Owner, locked

HOLD = """
import errno, fcntl, sys
from pathlib import Path
from flmjax.lock import locked

def no_flock(*_):
    raise OSError(errno.ENOSYS, "no flock")

if sys.argv[2] == "file":
    fcntl.flock = no_flock
with locked(Path(sys.argv[1]), "the folder"):
    print("locked", flush=True)
    sys.stdin.readline()
"""
QUICKSTART = f"--config={Path(__file__).parents[1] / 'configs' / 'quickstart.py'}"


@pytest.fixture(params=["flock", "file"])
def kind(request, monkeypatch):
    """The kernel's lock, or the file that stands in for it on a file system that has none."""
    if request.param == "file":
        monkeypatch.setattr(lock.fcntl, "flock", unsupported(errno.EOPNOTSUPP))
    return request.param


def unsupported(number: int):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


def holder(path: Path, kind: str) -> subprocess.Popen:
    """A process that holds the lock until a line comes on its standard input."""
    code = [sys.executable, "-c", HOLD, str(path), kind]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "locked\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.communicate("\n", timeout=30)


def test_a_second_process_is_refused_and_told_whose_the_lock_is(kind, tmp_path):
    """Two runs in one folder destroyed each other's checkpoints: Lightning-AI/pytorch-lightning#12369."""
    path = tmp_path / "run" / ".lock"
    process = holder(path, kind)
    words = rf"the folder is in use by process {process.pid} on {socket.gethostname()}, since \d{{4}}-.*:\d\d; wait"
    with pytest.raises(ConfigError, match=words), locked(path, "the folder"):
        pass
    end(process)
    with locked(path, "the folder"):
        assert path.parent.exists()
    assert not list(tmp_path.iterdir())  # no lock, no folder that held it alone


def test_a_process_that_waits_says_for_whom(kind, tmp_path):
    path, lines = tmp_path / ".lock", []
    process = holder(path, kind)

    def log(text: str) -> None:
        lines.append(text)
        end(process)

    with locked(path, "the folder", wait=True, log=log):
        assert process.returncode == 0
    assert len(lines) == 1
    assert lines[0].startswith(f"waiting for process {process.pid} on {socket.gethostname()}, since ")


def test_the_lock_of_a_dead_process_is_taken_over_and_said(kind, tmp_path):
    """The process is not yet reaped by its parent, as under a shell that does not wait."""
    path, lines = tmp_path / ".lock", []
    process = holder(path, kind)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with locked(path, "the folder", log=lines.append):
        pass
    process.communicate()
    assert len(lines) == 1
    assert f"the lock of process {process.pid} on " in lines[0]
    assert "taken over" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_flock_gets_another_lock(number, monkeypatch, tmp_path):
    """huggingface/datasets#8638: a file system without flock ended every call."""
    monkeypatch.setattr(lock.fcntl, "flock", unsupported(number))
    path = tmp_path / ".lock"
    with (
        locked(path, "the folder"),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"),
        locked(path, "the folder"),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "start"), [(os.getpid(), "long ago"), (2**22 - 1, None)], ids=["reused", "missing"])
def test_a_reused_or_missing_process_number_is_dead(number, start, monkeypatch, tmp_path):
    monkeypatch.setattr(lock.fcntl, "flock", unsupported(errno.ENOLCK))
    path, lines = tmp_path / ".lock", []
    owner = Owner(socket.gethostname(), number, start, "2026-01-01 00:00:00")
    path.with_name(".lock.owner").write_text(json.dumps(owner._asdict()))
    with locked(path, "the folder", log=lines.append):
        pass
    assert "which has ended, is taken over" in lines[0]


def test_an_owner_of_another_boot_is_no_process_of_this_machine():
    """Pods of one name run on one node after the other, with the same host name and the same process numbers."""
    owner = Owner.this_process()
    assert owner.boot is not None
    assert owner.is_local
    moved = owner._replace(boot="another boot", start="long ago")
    assert not moved.is_local
    assert not moved.is_dead
    unknown = owner._replace(boot=None, start="long ago")  # stored by an older version
    assert unknown.is_local
    assert unknown.is_dead


@pytest.mark.parametrize("change", ["older", "newer"])
def test_an_owner_stored_by_another_version_is_read(change, monkeypatch, tmp_path):
    monkeypatch.setattr(lock.fcntl, "flock", unsupported(errno.ENOLCK))
    stored = Owner("elsewhere", 7, None, "2026-01-01 00:00:00")._asdict() | {"color": "red"}
    if change == "older":
        stored = {name: stored[name] for name in ("host", "pid", "start", "since")}
    (tmp_path / ".lock.owner").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="process 7 on elsewhere"), locked(tmp_path / ".lock", "the folder"):
        pass


def test_locks_are_given_back_at_a_sudden_end(kind, tmp_path):
    """One that cannot be given back does not keep the others."""

    def fail() -> None:
        raise OSError("no answer")

    with lock.released_at_sudden_end(fail), locked(tmp_path / ".lock", "the folder"):
        assert list(tmp_path.iterdir())
        lock.release_held()
        assert not list(tmp_path.iterdir())
    assert not lock._releases


def test_an_owner_on_another_host_is_refused_with_the_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(lock.fcntl, "flock", unsupported(errno.ENOLCK))
    file = tmp_path / ".lock.owner"
    file.write_text(json.dumps(Owner("elsewhere", 7, None, "2026-01-01 00:00:00")._asdict()))
    with (
        pytest.raises(ConfigError, match=f"process 7 on elsewhere, .*if it has ended, delete {file}"),
        locked(tmp_path / ".lock", "the folder"),
    ):
        pass
    assert file.exists()


def test_another_error_of_the_file_system_names_the_file(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path / ".lock", "the folder"):
        pass


@pytest.mark.parametrize("command", ["train", "grow"])
def test_a_run_in_a_workdir_that_is_in_use_is_refused_at_once(command, capsys, tmp_path):
    workdir = tmp_path / "run"
    process = holder(workdir / ".lock", "flock")
    source = [f"--source={tmp_path}"] if command == "grow" else []
    assert cli.main([command, QUICKSTART, f"--workdir={workdir}", *source]) == 2
    error = capsys.readouterr().err
    assert f"{workdir} is in use by process {process.pid} on " in error
    assert error.count("\n") == 1
    assert [path.name for path in workdir.iterdir()] == [".lock"]
    end(process)
