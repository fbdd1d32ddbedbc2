"""Batches that a background thread puts on the devices: order, errors, and the end of the thread."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import grain
import jax
import numpy as np
import pytest

from flmjax.config import MeshShape
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.training.prefetch import BUFFER, on_devices


class Rows:
    """Element n is a batch of 8 sequences of 4 tokens, all of them n; a source that counts what is read."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.read: list[int] = []
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, n):
        if n == self.fails_at:
            raise OSError("the disk is gone")
        self.read.append(n)
        return {"tokens": np.full((8, 4), n, np.int32), "bytes": np.ones(8, np.float32)}


def dataset(rows: Rows) -> grain.IterDataset:
    return grain.MapDataset.source(rows).to_iter_dataset(grain.ReadOptions(num_threads=0))


@pytest.fixture(scope="module")
def sharding():
    return batch_sharding(make_mesh(MeshShape(2, 4, 1), jax.devices()))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "grain-thread-prefetch" in thread.name]


def read_to(rows: Rows, count: int) -> list[int]:
    """What is read after `count` elements are, or after ten seconds, and a moment for a thread that reads too much."""
    deadline = time.monotonic() + 10
    while len(rows.read) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    return rows.read


def test_batches_are_on_the_devices_in_their_order(sharding):
    with contextlib.closing(on_devices(dataset(Rows()), sharding)) as batches:
        for n in range(20):
            batch = next(batches)
            assert batch["tokens"].sharding == sharding
            assert batch["bytes"].shape == (8,)
            np.testing.assert_array_equal(batch["tokens"], n)


def test_batches_are_placed_before_they_are_asked_for(sharding):
    """BUFFER wait in the queue, and the thread has one more."""
    rows = Rows()
    with contextlib.closing(on_devices(dataset(rows), sharding)) as batches:
        next(batches)
        assert len(read_to(rows, 2 + BUFFER)) == 2 + BUFFER
        next(batches)
        assert len(read_to(rows, 3 + BUFFER)) == 3 + BUFFER


def test_an_error_is_raised_where_its_batch_was_due(sharding):
    with contextlib.closing(on_devices(dataset(Rows(fails_at=3)), sharding)) as batches:
        for n in range(3):
            np.testing.assert_array_equal(next(batches)["tokens"], n)
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
    assert not threads()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_also_where_it_waits_for_room(sharding, error):
    rows = Rows()
    with (
        contextlib.suppress(RuntimeError, KeyboardInterrupt),
        contextlib.closing(on_devices(dataset(rows), sharding)) as batches,
    ):
        next(batches)
        read_to(rows, 2 + BUFFER)
        assert len(threads()) == 1
        if error is not None:
            raise error
    assert not threads()


# The main thread waits for a batch whose reading takes a while, or has left the batches open.
PROGRAM = """
import contextlib, time
import grain, jax, numpy as np
from flmjax.config import MeshShape
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.training.prefetch import on_devices

class Rows:
    def __len__(self):
        return 1000
    def __getitem__(self, n):
        if n == 5:
            print("waits", flush=True)
            time.sleep(SECONDS)
        return {"tokens": np.full((8, 4), n, np.int32)}

def main():
    rows = grain.MapDataset.source(Rows()).to_iter_dataset(grain.ReadOptions(num_threads=0))
    batches = on_devices(rows, batch_sharding(make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])))
    END

main()
"""
WAITS = """
    with contextlib.closing(batches):
        while True:
            next(batches)
"""
LEAVES_OPEN = """
    for _ in range(4):
        next(batches)
"""


def start(code: str, environment: dict[str, str]) -> subprocess.Popen:
    line = [sys.executable, "-c", code]
    environment = {**environment, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_a_process_that_waits_for_a_batch(own_environment):
    process = start(PROGRAM.replace("SECONDS", "3").replace("    END", WAITS), own_environment)
    try:
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert error.rstrip().endswith("KeyboardInterrupt"), error
    assert process.returncode != 0


def test_a_process_ends_that_leaves_its_batches_open(own_environment):
    process = start(PROGRAM.replace("SECONDS", "0").replace("    END", LEAVES_OPEN), own_environment)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, error
