"""A run that is asked to end before its last step saves, and goes on exactly: in one process and in several."""

import contextlib
import random
import signal
import threading
import time

import pytest
from process_cases import (
    LOCAL,
    assert_close,
    command,
    left_over,
    running,
    statuses,
    timeless,
    train,
    write_lab,
)

from flmjax.interrupt import Stopped
from flmjax.training import stopping
from flmjax.training.stopping import Stopping
from flmjax.workdir.metrics import read_metrics
from flmjax.workdir.paths import latest_whole_step


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a config and the run `straight` of one process, which was not stopped."""
    lab = write_lab(tmp_path_factory.mktemp("lab"))
    assert statuses(train(lab, lab / "straight", processes=1)) == [0]
    return lab


# ---- one process -----------------------------------------------------------------------------------------------------

# Each stop of one run: the point, the signal, and the steps that may be on disk after it. (Its driver: a signal.)
STOPS = [
    ("devices:SIGTERM", None),
    ("prepare:SIGTERM", None),
    ("compile:SIGTERM", 1),
    ("update.3:SIGUSR1", 3),
    ("evaluate:SIGTERM", 4),
    ("save.1:SIGTERM", 6),
    ("evaluate:SIGUSR1", 8),
    ("grow:SIGTERM", 8),
    ("update.13:SIGTERM", 13),
    ("update.16:SIGTERM", 16),
]


def test_a_run_that_is_stopped_anywhere_goes_on_exactly(lab):
    """A signal ended the process at once, and the steps since the last checkpoint were lost."""
    workdir = lab / "stopped"
    for when, step in STOPS:
        (ended,) = train(lab, workdir, processes=1, when=when)
        assert ended.status == 75, (when, ended.err)
        where = "" if step is None else f": stopped at step {step}; step {step} is on disk"
        reason = when.partition(":")[2]
        assert ended.err.splitlines()[-1] == f"flmjax: stopped by {reason}{where}; run the same command again to go on"
        assert latest_whole_step(workdir / "checkpoints") == step, when
        assert not (workdir / ".lock").exists()
    shown = train(lab, workdir, processes=1)[0].out
    assert "resume at step 16:" in shown
    assert "large 16: validation loss" in shown  # the last stop came before it
    assert timeless(workdir) == timeless(lab / "straight")


def test_ctrl_c_saves_and_a_second_one_ends_at_once(lab):
    workdir = lab / "interrupted"
    (once,) = train(lab, workdir, processes=1, when="update.3:SIGINT")
    assert once.status == 130
    assert once.err == (
        "flmjax: interrupted: stopped at step 3; step 3 is on disk; run the same command again to go on\n"
    )
    (twice,) = train(lab, workdir, processes=1, when="update.6:twice")
    assert twice.status == 130
    assert twice.err == "flmjax: interrupted twice: nothing more is saved; run the same command again to go on\n"
    assert latest_whole_step(workdir / "checkpoints") in (3, 5)
    assert not (workdir / ".lock").exists()


def test_a_limit_of_time_stops_the_run(lab):
    (ended,) = train(lab, lab / "limited", "--config.stop_after_seconds=0.1", processes=1)
    assert ended.status == 75
    assert ended.lines == [
        "flmjax: stopped by its limit of time, stop_after_seconds=0.1: stopped at step 0; no step is on disk yet; run "
        "the same command again to go on"
    ]


def test_signals_are_handled_in_the_block_alone():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with Stopping(None):
        with pytest.raises(Stopped) as raised:
            signal.raise_signal(signal.SIGTERM)
        assert (raised.value.reason, raised.value.status) == ("SIGTERM", 75)
        signal.raise_signal(signal.SIGTERM)  # the process is ending
    with Stopping(None) as stop:
        with stop.deferred():
            assert not stop.reached()
            signal.raise_signal(signal.SIGUSR1)
            assert stop.reached()
            assert stop.stopped.status == 75
            signal.raise_signal(signal.SIGTERM)  # does not cut off the closing of what is saved
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


# ---- agreement -------------------------------------------------------------------------------------------------------


class Store:
    """The entries that the simulated processes of a run share."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.lock = threading.Lock()


class SimulatedPeers:
    """One of several processes, simulated by threads: as Peers, without JAX's service."""

    def __init__(self, store: Store, process: int, processes: int) -> None:
        self.store, self.process, self.processes, self.wake_file = store, process, processes, -1
        self.failures = 0  # calls of the watching thread that fail from now on, as with a coordinator that is busy

    def next_key(self, name):
        return f"{name}/1"

    def put(self, key, value, root):
        if self.failures and threading.current_thread().name == "watch":
            self.failures -= 1
            raise RuntimeError("UNAVAILABLE")
        with self.store.lock:
            self.store.values.setdefault(key, value)

    def entries(self):
        with self.store.lock:
            return dict(self.store.values)

    def listen(self, listener):
        pass

    def signals(self):
        return b""


@pytest.mark.parametrize("seed", range(20))
def test_processes_of_any_speed_end_at_the_same_point(seed):
    """At most AHEAD + 1 points apart, as updates keep them; one or all of them are asked to end, at any time."""
    rng = random.Random(seed)
    processes, points, store = rng.choice([2, 3, 5]), 60, Store()
    agreements, ends, passed = [], [None] * processes, [0] * processes
    for i in range(processes):
        agreements.append(stopping._Agreement(SimulatedPeers(store, i, processes)))
        agreements[i]._peers.failures = rng.choice([0, 1, 3])
    asked = {i: rng.randrange(points) for i in range(processes) if i == 0 or rng.random() < 0.5}
    finished = threading.Event()

    def watch(agreement, pause):
        while not finished.is_set():
            with contextlib.suppress(RuntimeError):  # as Peers: until the next time
                agreement._notice(agreement._peers.entries())
            time.sleep(pause)

    def run(i, pauses):
        for point in range(points):
            while passed[i] - min(passed) > 2:
                time.sleep(0.0005)
            if asked.get(i) == point:
                agreements[i].request("SIGTERM")
            if agreements[i].reached():
                ends[i] = point
                break
            passed[i] = point + 1
            time.sleep(pauses.random() * 0.004)
        passed[i] = 2**62
        if ends[i] is None:
            agreements[i].end()

    threads = [threading.Thread(target=watch, name="watch", args=(a, rng.random() * 0.01)) for a in agreements]
    runs = [threading.Thread(target=run, args=(i, random.Random(seed + i))) for i in range(processes)]
    for thread in (*threads, *runs):
        thread.daemon = True
        thread.start()
    for thread in runs:
        thread.join(20)
        assert not thread.is_alive(), (ends, passed, store.values)
    finished.set()
    assert len(set(ends)) == 1, (ends, asked)
    assert ends[0] is None or ends[0] >= min(asked.values())


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_processes_stop_at_one_step_and_go_on(lab):
    """One process gets the signal, then another one, then Ctrl-C; the run equals that of one process to 1e-6."""
    workdir = lab / "several"
    for when, status in (("update.2:SIGTERM", 75), ("update.9:SIGUSR1:0", 75), ("update.13:SIGINT", 130)):
        results = train(lab, workdir, when=when)
        assert statuses(results) == [status] * 2, [result.err for result in results]
        step = latest_whole_step(workdir / "checkpoints")
        assert int(when.split(":")[0].split(".")[1]) <= step <= 16
        (line,) = results[0].lines
        assert f"stopped at step {step}; step {step} is on disk" in line
        assert results[1].lines == []
    assert statuses(train(lab, workdir)) == [0, 0]
    assert_close(workdir, lab / "straight", 1e-6)


def test_a_signal_before_the_first_update_ends_all(lab):
    """Nothing is to be saved; also in a growth point, whose update is not made."""
    workdir = lab / "early"
    results = train(lab, workdir, when="prepare:SIGTERM:0")
    assert statuses(results) == [75, 75], [result.err for result in results]
    assert [len(result.lines) for result in results] == [1, 0]
    results = train(lab, workdir, when="grow:SIGUSR1")
    assert statuses(results) == [75, 75], [result.err for result in results]
    assert latest_whole_step(workdir / "checkpoints") == 8
    assert not [line for line in read_metrics(workdir) if line["step"] > 8]


def test_local_sh_passes_a_signal_on_and_its_status_is_75(lab):
    workdir = lab / "local"
    line = [str(LOCAL), "2", *command(lab, workdir, "never")]
    with running(lab, line, DEVICES="1") as run:
        run.wait_for("small 2/16")
        run.send(0, signal.SIGTERM)
        (ended,) = run.ended()
    assert ended.status == 75, ended.err
    assert len(ended.lines) == 1
    assert latest_whole_step(workdir / "checkpoints") is not None
    assert left_over(workdir) == []
