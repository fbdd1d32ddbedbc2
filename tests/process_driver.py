"""`process_driver.py WHEN ARGS...`: the command line in a process to which something happens at a chosen point.

WHEN: never | POINT:SIGNAL[:RANK]. At the POINT the process, of several that of number RANK (1), gets the signal.
POINT: update.N (before the N-th update) | compile (before the first program is) | evaluate (in the first evaluation)
| save.N (while the N-th save is written) | grow (inside the growth point) | prepare (while data are prepared) | load
(before the position of the run is read) | devices (before the run has devices) | hash (before a file of tokens is
hashed). SIGNAL: the name of a signal, `raise` for a failed read of a file, or `twice` for two Ctrl-C. `nan` at
update.N: in every process, once, the batch of this update has a loss that is not finite.
"""

import contextlib
import os
import signal
import sys
import time

from flmjax import cli
from flmjax.data import prepare as preparation
from flmjax.data import prepared
from flmjax.training import loop, start
from flmjax.workdir.checkpoint import Checkpoints

FIELDS = [*sys.argv[1].split(":"), "", ""][:3]
POINT, SIGNAL, RANK = FIELDS
_done = []


def happen(point: str) -> None:
    """Do what WHEN says, once, if it is about this point and this process."""
    rank = os.environ.get("FLMJAX_PROCESS_ID")
    if point != POINT or SIGNAL == "nan" or _done or (rank is not None and rank != (RANK or "1")):
        return
    _done.append(point)
    if SIGNAL == "raise":
        raise OSError(5, "Input/output error", "tokens.u32")
    if SIGNAL == "twice":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        return
    os.kill(os.getpid(), getattr(signal, SIGNAL))


def poisoned(batch: dict, point: str) -> dict:
    """The batch, which has a loss that is not finite if WHEN says so."""
    if (point, "nan") != (POINT, SIGNAL) or _done:
        return batch
    _done.append(point)
    return {**batch, "weights": batch["weights"] * float("nan")}


def before(function, point):
    """The function, with something happening first."""

    def wrapped(*args, **kwargs):
        happen(point(*args, **kwargs) if callable(point) else point)
        return function(*args, **kwargs)

    return wrapped


def main() -> None:
    run_stage, save = loop.run_stage, Checkpoints.save
    saves = 0

    def watched_stage(state, spec, stage, rate, batches, *bar):
        first = int(state.step)  # the state is donated to the first update

        def watched():
            for step, batch in enumerate(batches, start=first):
                happen(f"update.{step + 1}")
                if step == first:
                    happen("compile")
                yield poisoned(batch, f"update.{step + 1}")

        return run_stage(state, spec, stage, rate, watched(), *bar)

    def watched_save(self, step, items, meta):
        nonlocal saves
        saves += 1
        save(self, step, items, meta)
        happen(f"save.{saves}")

    loop.run_stage, Checkpoints.save = watched_stage, watched_save
    loop.validation_loss = before(loop.validation_loss, "evaluate")
    loop.grow_into = before(loop.grow_into, "grow")
    start.resumed_position = before(start.resumed_position, "load")
    start.stage_meshes = before(start.stage_meshes, "devices")
    prepared.sha256 = before(prepared.sha256, "hash")
    preparation.encode_parts = before(preparation.encode_parts, "prepare")
    sys.argv = ["flmjax", *sys.argv[2:]]
    with contextlib.suppress(BrokenPipeError):
        cli.run()


if __name__ == "__main__":
    main()
