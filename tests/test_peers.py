"""What processes of a run tell each other, over a store in this process: who is lost, and why a process ends."""

import threading
import time

import pytest

from flmjax.sharding import peers
from flmjax.sharding.peers import Peers

HEARTBEAT = 2.0


class Client:
    """A client of a key-value store, as that of JAX's coordination service."""

    def __init__(self):
        self.values, self.lock = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.lock:
            if key in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS: key")
            self.values[key] = value

    def key_value_dir_get(self, root):
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(root)]


class Parted(BaseException):
    """The end of a process, in a thread of it."""


@pytest.fixture
def run(monkeypatch):
    """Two processes of a run, and how each has ended: {process: (text, status)}."""
    ends = {}

    def end(text, status):
        ends.setdefault(owners[threading.current_thread()], (text, status))
        raise Parted

    monkeypatch.setattr(peers, "_end_once", end)
    monkeypatch.setattr(peers, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(peers, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(peers, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of Parted
    client, owners, processes = Client(), {}, []
    for number in range(2):
        before = set(threading.enumerate())
        processes.append(Peers(client, number, 2, "127.0.0.1:1", HEARTBEAT))
        (thread,) = set(threading.enumerate()) - before
        owners[thread] = number
    owners[threading.current_thread()] = 1  # the test is the main thread of process 1
    yield processes, ends
    for process in processes:
        process.close()


def wait_for_end(ends, process, seconds=15.0):
    until = time.monotonic() + seconds
    while process not in ends and time.monotonic() < until:
        time.sleep(0.02)
    return ends.get(process)


def test_a_process_that_says_nothing_is_lost(run, monkeypatch):
    processes, ends = run
    time.sleep(0.3)
    monkeypatch.setattr(processes[1]._closed, "is_set", lambda: True)  # its thread ends without a word
    assert wait_for_end(ends, 0) == ("process 1 of 2 is lost, and the others end; start the run again to go on", 1)


def test_a_process_whose_run_has_ended_is_not_lost(run):
    """Process 0 was ended by it while it wrote the report, or uploaded it, for longer than the heartbeat."""
    processes, ends = run
    processes[1].close()
    assert wait_for_end(ends, 0, 2 * HEARTBEAT) is None


def test_the_cause_of_a_failed_exchange_is_printed(run):
    """Process 1 alone has an error, for which another process may be the cause; none is lost. A line was empty."""
    processes, ends = run
    with pytest.raises(Parted):
        processes[1].end_after_lost("UNAVAILABLE: exchange 7 failed")
    wait_for_end(ends, 0)
    assert [ends[0], ends[1]] == [("process 1 of 2: UNAVAILABLE: exchange 7 failed", 1), (None, 1)]


def test_an_error_that_all_have_is_printed_once(run, capfd):
    """Also where process 0 comes to it later than it notices the other's end."""
    processes, ends = run
    threading.Timer(0.3, lambda: processes[0]._announce(peers.Ending("no data", 2, True))).start()
    with pytest.raises(Parted):
        processes[1].leave("no data", 2, is_shared=True)
    assert ends[1] == (None, 2)


def test_an_error_of_the_watching_thread_ends_the_process(run):
    """It was dropped, and a process that died after it went unnoticed."""
    processes, ends = run

    def fail(_):
        raise KeyError("passed")

    processes[1].listen(fail)
    assert wait_for_end(ends, 1) == ("process 1 of 2: the watch of the other processes failed: KeyError('passed')", 1)


def test_entries_stay_and_keys_are_used_once(run):
    processes, _ = run
    for process in processes:
        assert [process.next_key("data"), process.next_key("data")] == ["data/1", "data/2"]
    processes[0].put("data/1", "a")
    processes[1].put("data/1", "b")
    assert processes[1].wait_for("data/1") == {"data/1": "a"}
