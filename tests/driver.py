"""`driver.py WHEN ARGS...`: the command line in a process that dies at a point that a test chooses.

WHEN: never | batch:N (kill -9 before the N-th update) | saved:N (the same, once the last save is complete)
| interrupt:N (Ctrl-C before the N-th update) | sampling (Ctrl-C while the first text sample is generated)
| growth (inside the growth point, before its certificate) | saving:N (while the N-th save is being written)
| full:N (from the N-th save on no file may grow past 20 kB)
| nan:N (from the N-th update on every gradient is not a number).
The step and the checksum of every batch go to DRIVER_LOG; batches that tune a growth are steps -1, -2...
"""

import os
import resource
import signal
import sys
import threading
import zlib

import numpy as np

from flmjax import cli
from flmjax.training import growth_point, loop
from flmjax.workdir.checkpoint import Checkpoints


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def end_before_update(when, checkpoints):
    if when == "interrupt":
        raise KeyboardInterrupt
    if when == "saved":
        checkpoints.wait()
    if when in ("batch", "saved"):
        die()


def log(step, tokens):
    with open(os.environ["DRIVER_LOG"], "a") as file:
        file.write(f"{step} {zlib.crc32(np.asarray(tokens).tobytes())}\n")


def logged(placed):
    for i, batch in enumerate(placed):
        log(-1 - i, batch["tokens"])
        yield batch


def main() -> int:
    when, _, number = sys.argv[1].partition(":")
    saves, checkpoints = 0, None
    save, run_stage, tune = Checkpoints.save, loop.run_stage, growth_point.tune

    def logged_stage(state, spec, stage, rate, batches):
        def logged_batches():
            for step, row in enumerate(batches, start=int(state.step)):
                if step + 1 == int(number or 0):
                    end_before_update(when, checkpoints)
                log(step, row["tokens"])
                if when == "nan" and step + 1 >= int(number):
                    row = {**row, "weights": row["weights"] * float("nan")}
                yield row

        return run_stage(state, spec, stage, rate, logged_batches())

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
    if when == "sampling":
        loop.generate = interrupt
    if when == "growth":
        growth_point.certify = die
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
