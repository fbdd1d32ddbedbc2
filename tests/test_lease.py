"""The lease of a workdir on object storage: refused, taken over, renewed, lost and given back, on a local S3 server."""

import os
import socket
import threading
import time

import pytest
from storage_cases import SILENT, store_of, write_lease

from flmjax.config import ConfigError
from flmjax.lock import Owner, release_held
from flmjax.workdir import lease
from flmjax.workdir.lease import LEASE_FILE, Lease, LeaseLostError, leased
from flmjax.workdir.local_copy import working_copy
from flmjax.workdir.storage import list_objects, read_object, remote_path


def test_a_second_run_is_refused_and_told_whose_the_lease_is(url):
    words = rf"{url} is in use by process {os.getpid()} on {socket.gethostname()}, since .*, whose lease lasts until \d"
    with leased(url, SILENT), pytest.raises(ConfigError, match=words), leased(url, SILENT):
        pass
    assert list_objects(url) == {}  # given back


def test_the_lease_of_a_dead_process_is_taken_over_at_once(url):
    lines: list[str] = []
    write_lease(url, socket.gethostname(), 2**22 - 1, None, time.time() + 60)
    with leased(url, lines.append):
        pass
    assert [line.partition(" on ")[0] for line in lines] == [f"{url}: the lease of process {2**22 - 1}"]
    assert lines[0].endswith("which has ended, is taken over")


def test_a_lease_of_another_host_is_waited_for_while_it_lasts(url, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    write_lease(url, "elsewhere", 7, None, time.time() + 60)
    lines: list[str] = []
    start = time.monotonic()
    with leased(url, lines.append):
        assert time.monotonic() - start > 1.0
    assert lines[0].startswith(f"{url} was in use by process 7 on elsewhere, since 2026-01-01 00:00:00, whose lease")
    assert "the lease of process 7 on elsewhere" in lines[1]


def test_a_lease_that_ended_long_ago_is_taken_over_at_once(url):
    write_lease(url, "elsewhere", 7, None, time.time() - 2 * lease.LEASE_SECONDS)
    start = time.monotonic()
    with leased(url, SILENT):
        assert time.monotonic() - start < 10


def test_a_run_on_another_host_that_renews_its_lease_is_respected(url):
    write_lease(url, "elsewhere", 7, None, time.time() + 60)
    renewal = threading.Timer(0.5, write_lease, (url, "elsewhere", 7, None, time.time() + 80))
    renewal.start()
    with pytest.raises(ConfigError, match="in use by process 7 on elsewhere, since 2026"), leased(url, SILENT):
        pass
    renewal.join()


def test_a_lease_is_renewed_by_a_thread(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    with leased(url, SILENT):
        first = read_object(f"{url}/{LEASE_FILE}")
        deadline = time.monotonic() + 20
        while read_object(f"{url}/{LEASE_FILE}") == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_run_whose_lease_was_taken_stores_nothing_more(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)

    def run() -> None:
        with working_copy(remote_path(url), SILENT) as copy:
            write_lease(url, "elsewhere", 7, None, time.time() + 60)
            time.sleep(1)
            (copy.folder / "config.json").write_text("1")
            copy.upload()

    with pytest.raises(
        LeaseLostError, match=f"^{url}: this run stops writing, because another run has taken the lease over: process 7"
    ):
        run()
    assert list(list_objects(url)) == [LEASE_FILE]  # of the other


def test_of_two_runs_that_start_at_once_one_gets_the_lease(url, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(Owner, "is_local", property(lambda self: True))
    both, results = threading.Barrier(2), []

    def run() -> None:
        both.wait()
        try:
            with leased(url, SILENT):
                time.sleep(1.5)
                results.append("has it")
        except ConfigError:
            results.append("refused")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == ["has it", "refused"]


def test_a_renewal_whose_answer_was_lost_is_no_loss(url):
    held = Lease(url, SILENT)
    held.acquire()
    before = held._generation
    assert held._write(before)
    held._generation = before  # as if the answer had not come
    held._renew()
    held.confirm()
    held.release()
    assert list_objects(url) == {}


def test_a_live_lease_is_not_taken_over_by_a_host_of_the_same_name(url, monkeypatch):
    """A pod that is rescheduled has the host name of the old one, and small process numbers that are in use again."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    write_lease(url, socket.gethostname(), os.getpid(), "long ago", time.time() + 60, boot="another boot")
    start = time.monotonic()
    with leased(url, SILENT):
        assert time.monotonic() - start > 1.0


def test_a_lease_that_cannot_be_read_is_watched(url, monkeypatch):
    """It may be that of a later version, which renews it."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    store_of(url).write(LEASE_FILE, b"{").result()
    lines: list[str] = []
    start = time.monotonic()
    with leased(url, lines.append):
        assert time.monotonic() - start > 1.0
    assert (
        lines[0]
        == f"{url} was in use by a run whose lease (.lease) cannot be read; waiting until it is renewed or ends"
    )
    assert lines[1] == f"{url}: the lease of an unknown run, which has ended, is taken over"


def test_a_lease_that_cannot_be_read_but_is_renewed_is_respected(url):
    store_of(url).write(LEASE_FILE, b"{").result()
    renewal = threading.Timer(0.5, lambda: store_of(url).write(LEASE_FILE, b"[1]").result())
    renewal.start()
    with (
        pytest.raises(ConfigError, match=r"in use by a run whose lease \(.lease\) cannot be read"),
        leased(url, SILENT),
    ):
        pass
    renewal.join()


def test_a_lease_of_a_later_version_is_read(url):
    write_lease(url, "elsewhere", 7, None, time.time() - 2 * lease.LEASE_SECONDS, color="red")
    lines: list[str] = []
    with leased(url, lines.append):
        pass
    assert lines == [
        f"{url}: the lease of process 7 on elsewhere, since 2026-01-01 00:00:00, which has ended, is taken over"
    ]


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="the system does not count suspension")
def test_a_lease_is_looked_at_after_the_machine_was_suspended(url, monkeypatch):
    """time.monotonic stands still meanwhile; another run takes the lease over."""
    counted, suspended = time.clock_gettime, 100.0

    def clock_gettime(clock: int) -> float:
        return counted(clock) + (suspended if clock == time.CLOCK_BOOTTIME else 0.0)

    with leased(url, SILENT) as held:
        write_lease(url, "elsewhere", 7, None, time.time() + 160)
        held.confirm()
        monkeypatch.setattr(time, "clock_gettime", clock_gettime)
        with pytest.raises(LeaseLostError, match="process 7 on elsewhere"):
            held.confirm()


def test_a_lease_that_was_removed_is_lost(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", lease.LEASE_SECONDS)  # confirm renews at once
    with leased(url, SILENT) as held:
        store_of(url).write(LEASE_FILE, None).result()
        with pytest.raises(
            LeaseLostError, match=f"^{url}: this run stops writing, because the lease object was removed$"
        ):
            held.confirm()


def test_a_start_that_is_interrupted_leaves_no_lease(url, monkeypatch):
    """Ctrl-C comes when the lease is written and not yet confirmed."""

    def interrupt(_: float) -> None:
        assert LEASE_FILE in list_objects(url)
        raise KeyboardInterrupt

    def run() -> None:
        with leased(url, SILENT):
            pytest.fail("the run has begun")

    monkeypatch.setattr(lease.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    assert list_objects(url) == {}


def test_a_refused_start_leaves_the_lease_of_the_other(url):
    with leased(url, SILENT):
        with pytest.raises(ConfigError), leased(url, SILENT):
            pass
        assert list(list_objects(url)) == [LEASE_FILE]


def test_a_sudden_end_gives_the_lease_back(url):
    """Of a process that calls os._exit, as where another process of the run is lost."""
    with leased(url, SILENT):
        release_held()
        assert list_objects(url) == {}


def test_a_sudden_end_does_not_wait_for_a_store_without_answer(url, monkeypatch):
    monkeypatch.setattr(lease, "SUDDEN_END_SECONDS", 0.2)
    answer = threading.Event()
    with leased(url, SILENT) as held:
        monkeypatch.setattr(held, "release", lambda: answer.wait(30))
        start = time.monotonic()
        release_held()
        assert time.monotonic() - start < 10
        answer.set()
        monkeypatch.undo()
