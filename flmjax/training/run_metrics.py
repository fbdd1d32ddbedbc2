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
from flmjax.training.spikes import LossWatch, spike_values
from flmjax.training.state import StateSpec
from flmjax.training.step import named_norms
from flmjax.workdir.heartbeat import Heartbeat
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.progress import Clock, ProgressBar

METRICS = ("loss", "bits_per_byte", "gradient_norm", "language_loss", "teacher_loss", "judgement_accuracy")
OF_ALL_ROWS = ("loss", "gradient_norm")  # other metrics are of one kind of sequence, NaN in a batch without it


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
        watch: of loss spikes and of updates that are not finite.

    Attributes:
        newest: newest values since the last line of metrics, without OF_ALL_ROWS; checkpoints keep them.
        peak, peak_source: peak FLOP/s of a device, and the origin of that number.
    """

    def __init__(
        self,
        config: RunConfig,
        writer: MetricsWriter,
        bar: ProgressBar,
        heartbeat: Heartbeat,
        newest: dict[str, float],
        watch: LossWatch,
    ) -> None:
        self.config, self.writer, self.bar, self.heartbeat, self.newest = config, writer, bar, heartbeat, newest
        self.watch = watch
        if config.peak_flops is None:  # may be measured
            self.peak, self.peak_source = peak_flops(jax.local_devices()[0], config.model.dtype)
        else:
            self.peak, self.peak_source = config.peak_flops, "peak_flops of the config"

    def log(self, update: Fetched, stage: Stage, spec: StateSpec, clock: Clock) -> None:
        """Check the metrics of one update, and write them if due."""
        step, metrics, finished = update
        skipped = int(metrics["skipped_updates"])
        clock.tick(finished)
        if fault := self.watch.check(update, spec.abstract.params):
            self.bar.log(fault)
        if "parameter_norms" in metrics:
            self.write("norms", step, stage, **named_norms(metrics, spec.abstract.params))
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
            **spike_values(metrics),
        )
        parts = {kind: values[f"{kind}_loss"] for kind in ("language", "teacher") if f"{kind}_loss" in values}
        self.bar.update(step, stage.name, values["loss"], speed, parts)
        self.heartbeat.note(stage=stage.name, loss=values["loss"], tokens_per_second=speed)

    def write(self, kind: str, step: int, stage: Stage, **values: Any) -> None:
        """Write a line of metrics with the stage's name, and the tokens and FLOPs up to it."""
        tokens, flops = spent(stage, step)
        self.writer.write(kind, step, stage=stage.name, **values, tokens=tokens, flops=flops)
