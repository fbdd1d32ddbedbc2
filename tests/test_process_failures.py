"""A process that fails, dies or stops ends the whole run within seconds, with one line that names it."""

import json
import os
import re
import signal
import socket
import time

import pytest
from process_cases import LOCAL, TIMEOUT, command, free_port, left_over, running, statuses, train, write_lab

from flmjax.lock import Owner
from flmjax.workdir.paths import latest_whole_step

SECONDS = 8  # far below JAX's 95, with room for a busy machine


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a config and a compile cache."""
    return write_lab(tmp_path_factory.mktemp("lab"))


LONG = "--config.stages[0].steps=100000"  # of schedule constant; the test ends the run


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_one(victim, lab):
    """The status is 1: neither 75, which would say that the run is saved, nor the 134 of JAX's abort."""
    workdir = lab / f"killed_{victim}"
    with running(lab, *[command(lab, workdir, "never", LONG)] * 2) as run:
        run.wait_for("small 7/")
        end = time.monotonic() + TIMEOUT
        while latest_whole_step(workdir / "checkpoints") is None and time.monotonic() < end:
            time.sleep(0.02)
        run.send(victim, signal.SIGKILL)
        results = run.ended()
    survivor = results[1 - victim]
    assert results[victim].status == -signal.SIGKILL
    assert survivor.status == 1, survivor.err
    assert survivor.seconds < SECONDS
    assert len(survivor.lines) == 1
    assert f"process {victim} of 2 is lost" in survivor.lines[0]
    assert "Traceback" not in survivor.err
    assert latest_whole_step(workdir / "checkpoints") >= 5


def test_an_error_of_one_process_is_named_once(lab):
    workdir = lab / "error"
    results = train(lab, workdir, when="update.4:raise")
    assert statuses(results) == [1, 1], [result.err for result in results]
    lines = [line for result in results for line in result.lines]
    assert lines[-1] == "flmjax: process 1 of 2: OSError: [Errno 5] Input/output error: 'tokens.u32'"
    assert [line for line in lines if "process 1 of 2 is lost" not in line] == lines[-1:]
    assert max(result.seconds for result in results) < 60
    assert not (workdir / ".lock").exists()


def test_a_stopped_process_ends_the_run_within_the_heartbeat(lab):
    """A host that is silent but not gone: its connections stay open."""
    line = [str(LOCAL), "2", *command(lab, lab / "silent", "never", LONG, "--config.distributed.heartbeat_seconds=5")]
    with running(lab, line, DEVICES="1") as run:
        run.wait_for("small 7/")
        (victim,) = [pid for pid in children(run.processes[0].pid) if "FLMJAX_PROCESS_ID=1" in variables(pid)]
        os.kill(victim, signal.SIGSTOP)
        run.began = time.monotonic()
        (ended,) = run.ended()
    assert ended.status == 1, ended.err
    assert ended.seconds < 5 + 15 + SECONDS  # the heartbeat, and what local.sh waits for the other
    assert "process 1 of 2 is lost" in ended.err
    assert left_over(lab / "silent") == []


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def variables(pid: int) -> str:
    with open(f"/proc/{pid}/environ", errors="replace") as file:
        return file.read()


def test_an_error_that_all_share_is_printed_once(lab):
    """Of the command line, which is read before the processes meet, and of the devices, which are counted after."""
    for flags, words in ((["--config.seed=x"], "config.seed"), (["--config.mesh.tensor=3"], "has 3 places for 2")):
        results = train(lab, lab / "shared_error", *flags)
        assert statuses(results) == [2, 2], [result.err for result in results]
        (line,) = results[0].lines
        assert words in line
        assert results[1].lines == []
    assert "start" in line  # the way to launch as many processes as the mesh has places
    assert not (lab / "shared_error").exists()


def test_a_workdir_in_use_ends_all_processes(lab):
    """Two runs in one workdir; the lock names the first process of the other run."""
    workdir = lab / "in_use"
    with running(lab, *[command(lab, workdir, "never", LONG)] * 2) as first:
        first.wait_for("small 2/")
        results = train(lab, workdir, LONG)
        owner = first.processes[0].pid
    assert statuses(results) == [2, 2], [result.err for result in results]
    (line,) = results[0].lines
    assert f"{workdir} is in use by process {owner} on {socket.gethostname()}" in line
    assert results[1].lines == []
    shown = train(lab, workdir)[0].out  # the first run was killed; this one is refused for its fewer steps
    assert f"the lock of process {owner} on {socket.gethostname()}" in shown
    assert "which has ended, is taken over" in shown


def test_a_workdir_that_one_host_does_not_see_is_named(lab):
    there, elsewhere = (command(lab, lab / name, "never") for name in ("there", "elsewhere"))
    (lab / "elsewhere").mkdir()
    with running(lab, there, elsewhere) as run:
        results = run.ended()
    assert statuses(results) == [2, 2], [result.err for result in results]
    (line,) = results[0].lines
    host = socket.gethostname()
    assert f"{lab / 'there'} is not the same folder on all hosts" in line
    assert f"is not seen by {host} (process 1)" in line
    assert results[1].lines == []
    assert not (lab / "there").exists()


@pytest.mark.parametrize("fault", ["nobody", "missing"])
def test_a_wrong_coordinator_is_one_line_of_each_process(fault, lab):
    """An address where nothing answers, and a process that does not come."""
    line = command(lab, lab / "alone", "never", "--config.distributed.start_timeout_seconds=4")
    port = free_port()
    ranks = [0, 1] if fault == "missing" else [1]
    rows = []
    for rank in ranks:
        count = {"FLMJAX_PROCESSES": "3", "FLMJAX_PROCESS_ID": str(rank)}
        rows.append(
            ["env", *(f"{k}={v}" for k, v in count.items()), f"JAX_COORDINATOR_ADDRESS=127.0.0.1:{port}", *line]
        )
    with running(lab, *rows) as run:
        results = run.ended()
    assert statuses(results) == [1] * len(ranks), [result.err for result in results]
    assert max(result.seconds for result in results) < 4 + 20  # imports included
    for rank, result in zip(ranks, results, strict=True):
        (shown,) = result.lines
        assert re.search(rf"process {rank} of 3 waited \d s for the others", shown)
        assert result.err.count("\n") == 1, result.err
    words = f"not all of them came to 127.0.0.1:{port}" if fault == "missing" else "nothing answers at 127.0.0.1:"
    assert words in results[0].lines[0]


def test_ctrl_c_of_one_process_ends_all_while_data_are_prepared(lab):
    results = train(lab, lab / "prepared", when="prepare:SIGINT:0")
    assert statuses(results) == [130, 130], [result.err for result in results]
    assert [result.lines for result in results] == [["flmjax: interrupted; run the same command again to go on"], []]


def test_an_owner_in_another_container_is_not_judged(tmp_path):
    """Containers on one host count their processes apart: the number may be that of no process here."""
    here = Owner.this_process()
    gone = here._replace(pid=2**22 - 1, start=None)
    assert gone.is_dead
    there = gone._replace(namespace="pid:[1]")
    assert not there.is_dead
    assert not there.is_local
    assert Owner(**json.loads(json.dumps(there._asdict()))) == there
    assert Owner(here.host, gone.pid, None, "before").is_dead  # of an older version
