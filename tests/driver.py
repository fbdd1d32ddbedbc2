"""`driver.py WHEN ARGS...`: the command line in a process that dies where a test wants it to.

WHEN: never | batch:N (kill -9 when the N-th batch is placed) | growth (inside the growth point, before its certificate)
| saving:N (while the N-th save is being written) | full:N (from the N-th save on no file may grow past 20 kB).
Every batch's step and checksum go to DRIVER_LOG.
"""

import os
import resource
import signal
import sys
import threading
import zlib

from flmjax import cli
from flmjax.training import loop
from flmjax.training.checkpoint import Checkpoints


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    when, _, number = sys.argv[1].partition(":")
    counts = {"batch": 0, "save": 0}
    put_batch, save, run_stage = loop.put_batch, Checkpoints.save, loop.run_stage

    def counted_batch(rows, token_bytes, mesh):
        counts["batch"] += 1
        if when == "batch" and counts["batch"] == int(number):
            die()
        return put_batch(rows, token_bytes, mesh)

    def logged_stage(state, spec, config, index, rows, data):
        def logged_rows():
            for step, row in enumerate(rows, start=int(state.step)):
                with open(os.environ["DRIVER_LOG"], "a") as log:
                    log.write(f"{step} {zlib.crc32(row['tokens'].tobytes())}\n")
                yield row

        return run_stage(state, spec, config, index, logged_rows(), data)

    def counted_save(self, step, state, meta):
        counts["save"] += 1
        if counts["save"] == int(number or -1):
            if when == "saving":
                threading.Timer(0.02, die).start()
            if when == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return save(self, step, state, meta)

    loop.put_batch, loop.run_stage, Checkpoints.save = counted_batch, logged_stage, counted_save
    if when == "growth":
        loop.certify = die
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
