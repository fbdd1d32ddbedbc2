"""Progress of a run on a terminal, and the clock of its speed."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from flmjax.sharding.processes import is_writer

TICK_SECONDS = 0.5


class Clock:
    """Speed of training, without the step after a restart, which may compile or follow an evaluation."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._last, self._steps = 0.0, 0

    def restart(self) -> None:
        """Discard the steps timed so far."""
        self._start, self._steps = None, 0

    def tick(self, finished: float) -> None:
        """Count a step that was complete at the time `finished` (time.monotonic)."""
        self._last = finished
        if self._start is None:
            self._start = finished
        else:
            self._steps += 1

    def rate(self, tokens: int) -> float | None:
        """Tokens per second since the last call, at `tokens` tokens a step; None if no complete step was timed."""
        if self._start is None or not self._steps:
            return None
        rate = self._steps * tokens / max(self._last - self._start, 1e-9)
        self._start, self._steps = self._last, 0
        return rate


class ProgressBar:
    """Stage, step, loss, tokens/s and remaining time: a bar on a terminal, plain lines if stderr is a file or a pipe.

    Of several processes, the one that writes shows them.

    Args:
        total: steps of the run.
        initial: steps before this process started.
    """

    def __init__(self, total: int, initial: int = 0) -> None:
        self._is_shown = is_writer()
        self._total, self._initial, self._start = total, initial, time.monotonic()
        self.step = initial  # updates that this process knows of
        self._bar: tqdm | None = None
        is_terminal = self._is_shown and sys.stderr.isatty()
        if is_terminal and os.get_terminal_size(sys.stderr.fileno()).columns:  # some containers say 0
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} < {remaining}{postfix}"
            self._bar = tqdm(total=total, initial=initial, dynamic_ncols=True, bar_format=layout)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @contextlib.contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """Show what the process does in the block, with a clock that ticks on a terminal; else print one line."""
        if self._bar is None:
            self.log(text)
            yield
            return
        description, bar, done = self._bar.desc, self._bar, threading.Event()
        start = time.monotonic()

        def tick() -> None:
            while True:
                bar.set_description_str(f"{text} {tqdm.format_interval(time.monotonic() - start)}")
                if done.wait(TICK_SECONDS):
                    return

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()
            bar.set_description_str(description)

    def resume(self, step: int) -> None:
        """Set the steps before this process started."""
        self._initial, self._start, self.step = step, time.monotonic(), step
        if self._bar is not None:
            self._bar.initial = self._bar.n = step
            self._bar.refresh()

    def update(
        self, step: int, stage: str, loss: float, tokens_per_second: float | None, parts: Mapping[str, float] = {}
    ) -> None:
        """Show that `step` steps of the run are complete; without a terminal every call prints one line.

        Args:
            parts: losses of the kinds of sequences that `loss` is the mean of; those that are not finite are left out.
        """
        of_kinds = ", ".join(f"{name} {value:.4f}" for name, value in parts.items() if math.isfinite(value))
        numbers = f"loss {loss:.4f}" + (f" ({of_kinds})" if of_kinds else "")
        numbers += f", {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
        if not self._is_shown:
            return
        if self._bar is None:
            left = (time.monotonic() - self._start) / max(step - self._initial, 1) * (self._total - step)
            print(f"{stage} {step}/{self._total} {numbers}, {tqdm.format_interval(left)} left", flush=True)
            return
        self._bar.set_description_str(stage, refresh=False)
        self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update(step - self._bar.n)

    def log(self, text: str) -> None:
        """Print a line; a bar stays intact below it."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._is_shown:
            print(text, flush=True)
