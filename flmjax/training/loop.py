"""A run: stages of training with growth between them, started or resumed by the same call."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flmjax.config import ConfigError, RunConfig, Stage, to_json
from flmjax.config.validate import validate, validate_mesh
from flmjax.data.batch import global_batch
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import Prepared, data_warnings, with_vocabulary
from flmjax.evaluation.generate import generate, prompt_ids
from flmjax.evaluation.validation_loss import SourceSums, describe, jit_source_sums, validation_loss
from flmjax.growth.certificate import GrowthPoint
from flmjax.growth.growth import Growth
from flmjax.growth.learned import tuning_flops
from flmjax.growth.ramp import ramp_of
from flmjax.hardware import peak_flops
from flmjax.model.flops import FLOPS_CONVENTION, flops_per_token
from flmjax.model.transformer import count_parameters
from flmjax.optimizer.schedule import learning_rate
from flmjax.sharding.axes import Params
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.training.growth_point import grow_into, growth_key, prove_growth, samples_before, this_host
from flmjax.training.state import StateSpec, TrainState, from_items, init_state, state_spec, to_items
from flmjax.training.step import jit_train_step, nonfinite_leaves
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.paths import claim_workdir, data_directory
from flmjax.workdir.progress import Clock, ProgressBar

METRICS = ("loss", "bits_per_byte", "gradient_norm", "language_loss", "teacher_loss", "judgement_accuracy")
OF_ALL_ROWS = ("loss", "gradient_norm")  # other metrics are of one kind of sequence, NaN in a batch without it

Metrics = dict[str, jax.Array]


class TrainingError(RuntimeError):
    """Training cannot continue; the message says at which step and why. The last checkpoint is intact."""


def train(config: RunConfig, workdir: Path) -> None:
    """Run the schedule in `workdir` to its end, from the newest checkpoint there if it has one.

    Raises:
        ConfigError: for a setting, a source or a workdir that does not fit.
        CheckpointError: for a checkpoint that cannot be read or written.
        GrowthError: for a growth that does not keep its claim.
        TrainingError: after too many skipped updates in a row.
    """
    validate(config)
    mesh_shape = validate_mesh(config, jax.device_count())
    claim_workdir(config, workdir)
    data = prepare(config.data, data_directory(config, workdir), progress=True)
    config = with_vocabulary(config, data)
    mesh = make_mesh(mesh_shape, jax.devices())
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        step = checkpoints.latest_step() or 0
        with MetricsWriter(workdir, step) as writer, ProgressBar(config.total_steps, step) as bar:
            Run(config, workdir, data, mesh, checkpoints, writer, bar).run_schedule()


def run_stage(
    state: TrainState, spec: StateSpec, stage: Stage, rate: Callable[[int], float], batches: Iterator[dict[str, Any]]
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Yield (step, state, metrics on the device) after each update until the stage's end.

    The state is donated to the next update: the caller must not use it after it resumes the generator.

    Args:
        rate: update n = 0, 1, ... of the run -> learning rate.
        batches: batches on the devices.
    """
    step = int(state.step)
    ramp = ramp_of(stage)
    phases = [(ramp, ramp.end)] if ramp is not None else []
    for mask, end in [*phases, (None, stage.end)]:
        if step >= end:  # resumed after the mask was removed
            continue
        train_step = jit_train_step(spec, stage.layout.microbatches, mask)
        while step < end:
            state, metrics = train_step(state, next(batches), np.float32(rate(step)))
            step += 1
            yield step, state, metrics


def spent(stage: Stage, step: int) -> tuple[int, float]:
    """(tokens, model FLOPs) of the first `step` updates of a run, computed from the config alone.

    Args:
        stage: the stage that `step` belongs to. The batches of its learned growth are included.
    """
    tokens, flops = spent(stage.previous, stage.start) if stage.previous else (0, 0.0)
    length = stage.model.max_length
    updates = stage.updates_before(step)
    tokens += updates * stage.config.batch_size * length
    flops += updates * stage.config.batch_size * length * flops_per_token(stage.model, length)
    if stage.tuning_steps:
        flops += stage.tuning_steps * tuning_flops(Growth.into(stage))
    return tokens, flops


class Run:
    """A run in progress; its config has the tokenizer's vocabulary size."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        data: Prepared,
        mesh: Mesh,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        bar: ProgressBar,
    ) -> None:
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.checkpoints, self.writer, self.bar = checkpoints, writer, bar
        self.tokenizer = data.tokenizer
        self.stream = TrainingStream.of_run(config, data)
        self.validation = self.stream.validation_set(config.evaluation_rows)
        if config.sample_tokens:
            self.prompt = prompt_ids(config.sample_prompt, self.tokenizer, config.model.max_length)
        if config.peak_flops is None:  # may be measured
            self.peak, self.peak_source = peak_flops(jax.devices()[0], config.model.dtype)
        else:
            self.peak, self.peak_source = config.peak_flops, "peak_flops of the config"
        # Newest values since the last line of metrics, without OF_ALL_ROWS; checkpoints keep them.
        self.newest: dict[str, float] = {}

    def run_schedule(self) -> None:
        """Train every stage that is not finished, with growth between stages."""
        for stage in self.config.schedule:
            self.stream.check_size(stage.config.batch_size)
        for line in data_warnings(self.stream.prepared.meta["sources"], self.stream.length):
            self.bar.log(f"warning: {line}")
        index, spec, state = self.start()
        for stage in self.config.schedule[index:]:
            if stage.index > index:
                spec, state = self.grow(stage, spec, state)
            if int(state.step) < stage.end:
                state = self.train_stage(state, spec, stage)

    def start(self) -> tuple[int, StateSpec, TrainState]:
        """(index of the stage, its spec, state) at the start of this process.

        The state comes from the first that exists: 1. this run's newest checkpoint, 2. initialisation.
        """
        step = self.checkpoints.latest_step()
        if step is None:
            stage, state = self.config.schedule[0], None
        else:
            meta = self.checkpoints.meta(step)
            if meta["fingerprint"] != self.stream.fingerprint:
                raise ConfigError(
                    f"{self.workdir}: the data or its mixture is not that of the checkpoint at step {step} "
                    f"(fingerprint {self.stream.fingerprint[:12]}, there {meta['fingerprint'][:12]})"
                )
            stage = self.config.schedule[meta["stage"]]
            self.newest = meta.get("newest_metrics", {})  # older checkpoints have none
        spec = self.spec(stage)
        if step is None:
            state = init_state(spec, self.config.seed)
        else:
            state = from_items(self.checkpoints.restore(step, to_items(spec.abstract)))
        m = stage.model
        self.bar.log(
            f"{'start' if step is None else f'resume at step {step}'}: stage {stage.name}, "
            f"{count_parameters(state.params):,} parameters ({m.num_layers} layers x {m.embed_dim}, {m.num_heads} "
            f"heads, mlp {m.mlp_dim}), mesh {dict(self.mesh.shape)}"
        )
        self.bar.log(f"peak {self.peak:.3g} FLOP/s a device ({self.peak_source}); {FLOPS_CONVENTION}")
        return stage.index, spec, state

    def spec(self, stage: Stage) -> StateSpec:
        """Description of a stage's training state."""
        return state_spec(stage.model, self.config.optimizer, self.mesh)

    def train_stage(self, state: TrainState, spec: StateSpec, stage: Stage) -> TrainState:
        """Train to the stage's end; log, evaluate and save when due. Returns the state at the end."""
        first, size = samples_before(stage, int(state.step)), stage.config.batch_size
        host_batches = self.stream.batches(start=first, batch_size=size, **this_host())
        batches = (global_batch(batch, batch_sharding(self.mesh)) for batch in host_batches)
        sums_of = jit_source_sums(stage.model, self.mesh, len(self.validation.labels))
        ramp = ramp_of(stage)
        unmask: Any = jax.jit(ramp.at, out_shardings=spec.shardings.params) if ramp is not None else None
        rate = functools.partial(learning_rate, self.config.stages)
        clock = Clock()
        pending: tuple[int, Metrics] | None = None
        updates = run_stage(state, spec, stage, rate, batches)
        for step, state, metrics in updates:
            # Fetched while the next update computes.
            if pending is not None:
                self.log(*pending, stage, spec, clock)
            pending = (step, metrics)
            last, opened = step == stage.end, ramp is not None and step == ramp.end
            save_due = last or step % self.config.checkpoint.every == 0
            evaluation_due = last or step % self.config.evaluate_every == 0
            if save_due or evaluation_due or opened:
                self.log(*pending, stage, spec, clock)
                pending = None
                if evaluation_due:
                    is_masked = ramp is not None and step < ramp.end
                    self.evaluate(step, unmask(state.params, step) if is_masked else state.params, sums_of, stage)
                if opened:
                    self.bar.log(f"{stage.name} {step}: the growth mask is fully open; training continues without it")
                if save_due:
                    self.save(step, state, stage)
                clock.restart()
        self.write_sample(state, stage)
        self.checkpoints.wait()
        return state

    def log(self, step: int, metrics: Metrics, stage: Stage, spec: StateSpec, clock: Clock) -> None:
        """Check one step's metrics, and write them if due."""
        skipped = int(metrics["skipped_updates"])
        clock.tick()
        if skipped:
            leaves = nonfinite_leaves(np.asarray(metrics["finite"]), spec.abstract.params) or ["the loss"]
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
            model_flops_utilization=None if speed is None else speed * flops / (self.peak * self.mesh.size),
            skipped_updates=skipped,
        )
        self.bar.update(step, stage.name, values["loss"], speed or 0.0)

    def evaluate(self, step: int, params: Params, sums_of: SourceSums, stage: Stage) -> None:
        """Compute and write the validation loss."""
        batch_size = stage.config.batch_size // stage.layout.microbatches
        values = validation_loss(params, self.validation, sums_of, batch_size, self.mesh)
        self.write("validation", step, stage, **values)
        self.bar.log(f"{stage.name} {step}: {describe(values)}")

    def save(self, step: int, state: TrainState, stage: Stage) -> None:
        """Start writing a checkpoint."""
        meta = {
            "stage": stage.index,
            "samples_seen": samples_before(stage, step),
            "fingerprint": self.stream.fingerprint,
            "newest_metrics": self.newest,
            "config": to_json(self.config),
        }
        self.checkpoints.save(step, to_items(state), meta)

    def grow(self, stage: Stage, spec: StateSpec, state: TrainState) -> tuple[StateSpec, TrainState]:
        """Spec and state at the start of `stage`, grown and certified. The state before growth is already saved."""
        assert stage.previous is not None
        start, key, new = time.monotonic(), growth_key(self.config, stage.index), self.spec(stage)
        grown = grow_into(stage, state, (spec, new), key, self.stream, self.bar.log)
        point = GrowthPoint(int(state.step), stage.previous.name, stage.name)
        pair = (state.params, grown.params)
        growth = Growth.into(stage, key)
        prove_growth(self.config, self.workdir, self.stream, self.mesh, pair, growth, point, self.bar.log)
        self.write("growth", point.step, stage, from_stage=point.from_stage, seconds=time.monotonic() - start)
        return new, grown

    def write_sample(self, state: TrainState, stage: Stage) -> None:
        """Write a text sample of the stage's last model."""
        if not self.config.sample_tokens:
            return
        key = jax.random.key(self.config.seed)
        ids = generate(state.params, stage.model, [self.prompt], self.config.sample_tokens, key)[0]
        text = self.tokenizer.decode(ids[len(self.prompt) :])
        step = int(state.step)
        self.writer.write("sample", step, stage=stage.name, prompt=self.config.sample_prompt, text=text)

    def write(self, kind: str, step: int, stage: Stage, **values: Any) -> None:
        """Write a line of metrics with the stage's name, and the tokens and FLOPs up to it."""
        tokens, flops = spent(stage, step)
        self.writer.write(kind, step, stage=stage.name, **values, tokens=tokens, flops=flops)
