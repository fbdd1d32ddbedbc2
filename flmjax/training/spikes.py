"""Loss spikes and updates that are not finite: how they are told, and what a run does about them."""

import collections
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flmjax.config import RunConfig, SpikeConfig, Stage
from flmjax.data.loader import TrainingStream
from flmjax.growth.families import family_of
from flmjax.sharding.axes import Params
from flmjax.sharding.processes import barrier, from_writer, is_writer
from flmjax.training.pending import AHEAD, Fetched
from flmjax.training.step import Metrics, nonfinite_leaves
from flmjax.workdir.paths import checkpoint_directory, read_parent, whole_steps
from flmjax.workdir.position import Position
from flmjax.workdir.roll_backs import RollBack, complete_roll_back, read_roll_backs, record_roll_back

NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class TrainingError(RuntimeError):
    """Training cannot continue; the message says at which step and why. The last checkpoint is intact."""


class SpikeError(Exception):
    """The run must go back to an older checkpoint.

    Attributes:
        first, last: updates that spiked or were not finite; one number for a spike.
        loss: of the last one.
    """

    def __init__(self, reason: str, first: int, last: int, loss: float) -> None:
        super().__init__(reason)
        self.first, self.last, self.loss = first, last, loss


class LossWindow:
    """Losses of the newest updates, and the limit above which the loss of an update is a spike.

    The limit of update n comes from the updates up to n - 1 - AHEAD: the host knows no later loss when it dispatches
    update n, unless it waits for the devices. Checkpoints store the losses, so a resumed run has the same limits.

    Args:
        config: settings.
        losses: of the newest updates, as `losses` has them.
        step: updates of the run, the last of `losses` included.
    """

    def __init__(self, config: SpikeConfig, losses: Sequence[float] = (), step: int = 0) -> None:
        self._config = config
        self._losses = collections.deque(losses, maxlen=config.window + AHEAD)
        self._step = step
        self._pending: collections.deque[tuple[int, jax.Array]] = collections.deque()

    @property
    def losses(self) -> list[float]:
        """Losses of the newest updates, the newest last."""
        return list(self._losses)

    def clear(self) -> None:
        """Forget the losses, after a growth that changed the function of the model."""
        self._losses.clear()

    def add(self, step: int, loss: float) -> None:
        """Add the loss of an update; that of an update which is in the window already is dropped."""
        if step > self._step:
            self._losses.append(loss)
            self._step = step

    def dispatched(self, step: int, loss: jax.Array) -> None:
        """Add the loss of an update that was just dispatched; it is copied when a limit needs it."""
        self._pending.append((step, loss))

    def limit(self, step: int) -> float:
        """Bar of update number `step`; infinite while less than half a window of finite losses is known."""
        last = step - 1 - AHEAD
        while self._pending and self._pending[0][0] <= last:
            pending, loss = self._pending.popleft()
            if pending > self._step:
                self.add(pending, float(jax.device_get(loss)))
        known = self.losses[: max(len(self._losses) - max(self._step - last, 0), 0)]
        finite = [loss for loss in known[-self._config.window :] if math.isfinite(loss)]
        if 2 * len(finite) < self._config.window:
            return math.inf
        median = statistics.median(finite)
        deviation = NORMAL * statistics.median(abs(loss - median) for loss in finite)
        return median + self._config.deviations * deviation


class LossWatch:
    """What a run does about spikes and updates that are not finite.

    Args:
        config: of the run.
        losses: of the updates before the first, oldest first.
        step: updates of the run before the first.
    """

    def __init__(self, config: RunConfig, losses: Sequence[float], step: int) -> None:
        self._action, self._max_skipped = config.spike.action, config.optimizer.max_skipped_updates
        self.window = LossWindow(config.spike, losses, step)
        # From the number of an update to the loss above which the training step skips it; None: spikes are not skipped.
        self.loss_limit: Callable[[int], float] | None = self.window.limit if self._action == "skip" else None

    @classmethod
    def of_run(cls, config: RunConfig, position: Position | None) -> "LossWatch":
        """The watch of a run that goes on at `position`; None: from its start."""
        return cls(config, (), 0) if position is None else cls(config, position.recent_losses, position.step)

    @property
    def stored_losses(self) -> list[float | None]:
        """Losses of the newest updates for the metadata of a checkpoint; None for one that was not finite."""
        return [loss if math.isfinite(loss) else None for loss in self.window.losses]

    def after_growth(self, stage: Stage) -> None:
        """Forget the losses of the stage before if the growth into `stage` may have changed them."""
        if not family_of(stage.config.growth).is_exact:
            self.window.clear()

    def dispatched(self, step: int, metrics: Metrics) -> None:
        """Take notice of an update that was just dispatched."""
        if self.loss_limit is not None:
            self.window.dispatched(step, metrics["loss"])

    def check(self, update: Fetched, params: Params) -> str | None:
        """A line to log about the update; None if nothing is wrong. Updates come in their order.

        Args:
            params: parameters or their abstract form, for the paths of leaves.

        Raises:
            TrainingError: if the run must stop.
            SpikeError: if it must go back.
        """
        step, metrics, _ = update
        loss, skipped = float(metrics["loss"]), int(metrics["skipped_updates"])
        limit = self.window.limit(step) if self._action in ("roll_back", "stop") else math.inf
        if self._action != "none":
            self.window.add(step, loss)
        if skipped:
            text = f"step {step}: update skipped, {_fault(metrics, params)} ({skipped} in a row)"
            if skipped >= self._max_skipped:
                if self._action == "roll_back":
                    raise SpikeError(f"{skipped} updates in a row not finite", step - skipped + 1, step, loss)
                raise TrainingError(f"{text}; training stopped with the parameters of step {step - skipped}")
            return text
        if loss > limit:
            text = f"loss spike: {loss:.4f} above the limit of {limit:.4f}"
            if self._action == "roll_back":
                raise SpikeError(text, step, step, loss)
            raise TrainingError(f"step {step}: {text}; training stopped, the last checkpoint is older")
        return None


def _fault(metrics: dict[str, np.ndarray], params: Params) -> str:
    if metrics.get("spike"):
        return f"loss spike, loss {float(metrics['loss']):.4f}"
    leaves = nonfinite_leaves(metrics["finite"], params) or ["the loss"]
    return f"not finite: {', '.join(leaves[:3])}"


# ---- roll-backs ------------------------------------------------------------------------------------------------------


def roll_back(spike: SpikeError, config: RunConfig, stream: TrainingStream, first_sample: int, workdir: Path) -> str:
    """Record that the run goes back before `spike`; finish_roll_back does so. Returns a line to log.

    Args:
        stream: of the run.
        first_sample: of the run in the stream.

    Raises:
        TrainingError: if the run has rolled back often enough, or if no checkpoint is old enough.
    """
    settings, done = config.spike, from_writer(len(read_roll_backs(workdir)))
    name = f"step {spike.last}: {spike}"
    if done >= settings.max_roll_backs:
        raise TrainingError(f"{name}; training stopped after {done} roll-backs (spike.max_roll_backs)")
    to_step = from_writer(_target(spike.first - settings.roll_back_steps, config, workdir))
    if to_step < 0:
        raise TrainingError(
            f"{name}; training stopped: no checkpoint is {settings.roll_back_steps} steps older (spike.roll_back_steps)"
        )
    last, stage = min(spike.last + settings.skip_batches, config.total_steps), config.schedule[-1]
    read = config.stage_at(last).samples_before(last)
    read += (spike.last + settings.skip_batches - last) * stage.config.batch_size  # past the end of the run
    first = stream.samples_passed(first_sample + config.stage_at(to_step).samples_before(to_step))
    end = stream.samples_passed(first_sample + read)
    loss = spike.loss if math.isfinite(spike.loss) else None
    if is_writer():
        record_roll_back(workdir, RollBack(spike.last, to_step, first, end, loss, str(spike)))
    barrier("a roll-back is recorded")
    return f"{name}; back to step {to_step}, samples {first:,} to {end - 1:,} are left out"


def finish_roll_back(workdir: Path) -> None:
    """Complete the roll-back that this process or one before it has recorded; every process of a run calls it."""
    if is_writer():
        complete_roll_back(workdir)
    barrier("a roll-back is complete")


def _target(latest: int, config: RunConfig, workdir: Path) -> int:
    """The newest step up to `latest` that the run can go back to; -1 if there is none.

    It can start again at step 0 if no checkpoint was due before `latest`, and if it was not grown from another run.
    """
    steps = [step for step in whole_steps(checkpoint_directory(workdir)) if step <= latest]
    is_before_any = latest < min(config.checkpoint.every, config.stages[0].steps) and read_parent(workdir) is None
    return max(steps, default=0 if is_before_any else -1)


def spike_values(metrics: dict[str, Any]) -> dict[str, int]:
    """Values of a line of metrics that only runs with spike.action='skip' have: whether the loss was a spike."""
    return {"spike": int(metrics["spike"])} if "spike" in metrics else {}
