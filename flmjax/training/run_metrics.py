"""Lines of metrics of a run: what metrics.jsonl, TensorBoard and the terminal say of its updates."""

from typing import Any

import jax
import numpy as np

from flmjax.config import RunConfig, Stage
from flmjax.growth.growth import Growth
from flmjax.growth.learned import tuning_flops
from flmjax.hardware import peak_flops
from flmjax.model.flops import flops_per_token
from flmjax.optimizer.schedule import learning_rate
from flmjax.training.pending import Fetched
from flmjax.training.state import StateSpec
from flmjax.training.step import nonfinite_leaves
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.progress import Clock, ProgressBar

METRICS = ("loss", "bits_per_byte", "gradient_norm", "language_loss", "teacher_loss", "judgement_accuracy")
OF_ALL_ROWS = ("loss", "gradient_norm")  # other metrics are of one kind of sequence, NaN in a batch without it


class TrainingError(RuntimeError):
    """Training cannot continue; the message says at which step and why. The last checkpoint is intact."""


def spent(stage: Stage, step: int) -> tuple[int, float]:
    """(tokens, model FLOPs) of the first `step` updates of a run, computed from the config alone.

    Args:
        stage: the stage that `step` belongs to. The batches of its learned growth are included.
    """
    tokens_before, flops = spent(stage.previous, stage.start) if stage.previous else (0, 0.0)
    tokens = stage.tokens_before(step)
    flops += (tokens - tokens_before) * flops_per_token(stage.model, stage.model.max_length)
    if stage.tuning_steps:
        flops += stage.tuning_steps * tuning_flops(Growth.into(stage))
    return tokens, flops


class RunMetrics:
    """The metrics of a run, checked and written.

    Args:
        config: with the tokenizer's vocabulary size.
        newest: values of the teachers and the text that no line of metrics has yet.

    Attributes:
        newest: newest values since the last line of metrics, without OF_ALL_ROWS; checkpoints keep them.
        peak, peak_source: peak FLOP/s of a device, and the origin of that number.
    """

    def __init__(self, config: RunConfig, writer: MetricsWriter, bar: ProgressBar, newest: dict[str, float]) -> None:
        self.config, self.writer, self.bar, self.newest = config, writer, bar, newest
        if config.peak_flops is None:  # may be measured
            self.peak, self.peak_source = peak_flops(jax.devices()[0], config.model.dtype)
        else:
            self.peak, self.peak_source = config.peak_flops, "peak_flops of the config"

    def log(self, update: Fetched, stage: Stage, spec: StateSpec, clock: Clock) -> None:
        """Check the metrics of one update, and write them if due."""
        step, metrics, finished = update
        skipped = int(metrics["skipped_updates"])
        clock.tick(finished)
        if skipped:
            leaves = nonfinite_leaves(metrics["finite"], spec.abstract.params) or ["the loss"]
            text = f"step {step}: update skipped, not finite: {', '.join(leaves[:3])} ({skipped} in a row)"
            self.bar.log(text)
            if skipped >= self.config.optimizer.max_skipped_updates:
                raise TrainingError(f"{text}; training stopped with the parameters of step {step - skipped}")
        if "teacher_loss" in metrics:
            of_kinds = {name: float(metrics[name]) for name in METRICS if name not in OF_ALL_ROWS}
            self.newest |= {name: x for name, x in of_kinds.items() if not np.isnan(x)}
        if step % self.config.log_every and step != stage.end and not skipped:
            return
        length = stage.model.max_length
        speed = clock.rate(stage.config.batch_size * length)
        values = {name: float(metrics[name]) for name in METRICS if name in metrics}  # the last three: with teachers
        if not skipped:  # where batches alternate, a line has the newest batch of either kind
            values |= self.newest
        self.newest = {}
        flops = flops_per_token(spec.config, length)
        self.write(
            "train",
            step,
            stage,
            **values,
            learning_rate=learning_rate(self.config.stages, step - 1),
            tokens_per_second=speed,
            model_flops_utilization=None if speed is None else speed * flops / (self.peak * spec.mesh.size),
            skipped_updates=skipped,
        )
        parts = {kind: values[f"{kind}_loss"] for kind in ("language", "teacher") if f"{kind}_loss" in values}
        self.bar.update(step, stage.name, values["loss"], speed, parts)

    def write(self, kind: str, step: int, stage: Stage, **values: Any) -> None:
        """Write a line of metrics with the stage's name, and the tokens and FLOPs up to it."""
        tokens, flops = spent(stage, step)
        self.writer.write(kind, step, stage=stage.name, **values, tokens=tokens, flops=flops)
