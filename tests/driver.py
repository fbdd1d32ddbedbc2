"""`driver.py WHEN ARGS...`: the command line in a process that dies at a point that a test chooses.

WHEN: never | batch:N (kill -9 before the N-th update) | saved:N (the same, once the last save is complete)
| interrupt:N (Ctrl-C before the N-th update) | sampling (Ctrl-C while the first text sample is generated)
| growth (inside the growth point, before its certificate) | saving:N (while the N-th save is being written)
| full:N (from the N-th save on no file may grow past 20 kB)
| nan:N (from the N-th update on every gradient is not a number)
| unreadable (the file system fails when the arrays of a checkpoint are read)
| rolling_back (a roll-back is recorded, and newer checkpoints are still there).
In the batch whose checksum is DRIVER_POISON every gradient is not a number, whatever WHEN is.
The step and the checksum of every batch go to DRIVER_LOG; batches that tune a growth are steps -1, -2...
"""

import errno
import os
import resource
import signal
import sys
import threading
import zlib

import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flmjax import cli
from flmjax.sharding.processes import barrier, is_writer
from flmjax.training import growth_point, loop
from flmjax.workdir import roll_backs
from flmjax.workdir.checkpoint import Checkpoints


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def fail(*_args, **_kwargs):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def end_before_update(when, checkpoints):
    if when == "interrupt":
        raise KeyboardInterrupt
    if when == "saved":
        checkpoints.wait()
        barrier("saved")  # process 0 completes the save when all have written
    if when in ("batch", "saved"):
        die()


def log(step, samples):
    if is_writer():
        with open(os.environ["DRIVER_LOG"], "a") as file:
            file.write(f"{step} {samples}\n")


def checksum(tokens) -> str:
    if not tokens.is_fully_addressable:
        tokens = multihost_utils.process_allgather(tokens, tiled=True)
    return str(zlib.crc32(np.asarray(tokens).tobytes()))


def logged(placed):
    for i, batch in enumerate(placed):
        log(-1 - i, checksum(batch["tokens"]))
        yield batch


# Functions that a point of time replaces: module or class, name, function.
REPLACED = {
    "sampling": (loop, "generate", interrupt),
    "unreadable": (ocp.StandardCheckpointHandler, "restore", fail),
    "rolling_back": (roll_backs, "remove_checkpoints_past", die),
    "growth": (growth_point, "certify", die),
}


def main() -> int:
    when, _, number = sys.argv[1].partition(":")
    saves, checkpoints = 0, None
    save, run_stage, tune = Checkpoints.save, loop.run_stage, growth_point.tune

    def logged_stage(state, spec, stage, rate, batches, *bar):
        def logged_batches():
            for step, row in enumerate(batches, start=int(state.step)):
                if step + 1 == int(number or 0):
                    end_before_update(when, checkpoints)
                samples = checksum(row["tokens"])
                log(step, samples)
                is_poisoned = samples == os.environ.get("DRIVER_POISON")
                if is_poisoned or (when == "nan" and step + 1 >= int(number)):
                    row = {**row, "weights": row["weights"] * float("nan")}
                yield row

        return run_stage(state, spec, stage, rate, logged_batches(), *bar)

    def counted_save(self, step, items, meta):
        nonlocal saves, checkpoints
        saves, checkpoints = saves + 1, self
        if when == "full" and saves == int(number):
            self.wait()  # the save before is complete
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(self, step, items, meta)
        if when == "saving" and saves == int(number):  # the save before is complete, this one is being written
            threading.Timer(0.005, die).start()

    loop.run_stage, Checkpoints.save = logged_stage, counted_save
    growth_point.tune = lambda params, growth, value_and_grad, batches, shardings: tune(
        params, growth, value_and_grad, logged(batches), shardings
    )
    if when in REPLACED:
        setattr(*REPLACED[when])
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
