"""A run: stages of training with growth between them, started or resumed by the same call."""

import functools
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flmjax.config import ConfigError, RunConfig, Stage, to_json
from flmjax.config.validate import validate, validate_mesh
from flmjax.data.batch import Batch, global_batch
from flmjax.data.held_out import mixtures_of
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import META_FILE, data_warnings, with_vocabulary
from flmjax.data.prepared_folder import discard
from flmjax.evaluation.generate import generate, prompt_ids
from flmjax.evaluation.validation_loss import SourceSums, describe, jit_source_sums, validation_loss
from flmjax.growth.certificate import GrowthPoint
from flmjax.growth.growth import Growth
from flmjax.growth.learned import tuning_flops
from flmjax.growth.ramp import ramp_of
from flmjax.hardware import peak_flops
from flmjax.model.attention import check_backend
from flmjax.model.flops import flops_per_token
from flmjax.model.transformer import count_parameters
from flmjax.optimizer.schedule import learning_rate
from flmjax.sharding.axes import Params
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.text_table import printable
from flmjax.training.continuation import check_continuation, continued_stream
from flmjax.training.growth_point import grow_into, growth_key, prove_growth, this_host
from flmjax.training.state import (
    ITEMS,
    StateSpec,
    TrainState,
    from_items,
    init_state,
    restore_items,
    state_spec,
    to_items,
)
from flmjax.training.step import jit_train_step, nonfinite_leaves
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import MetricsWriter, read_metrics
from flmjax.workdir.paths import (
    data_directory,
    latest_whole_step,
    locked_workdir,
    remove_certificates,
    stored_config,
    write_config,
)
from flmjax.workdir.position import Position, newest_position
from flmjax.workdir.progress import Clock, ProgressBar
from flmjax.workdir.starts import StartEntry

METRICS = ("loss", "bits_per_byte", "gradient_norm", "language_loss", "teacher_loss", "judgement_accuracy")
OF_ALL_ROWS = ("loss", "gradient_norm")  # other metrics are of one kind of sequence, NaN in a batch without it

Metrics = dict[str, jax.Array]
Update = tuple[int, TrainState, Metrics]  # updates of the run so far, state and metrics after the last of them


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
    check_backend(config.model.attention, jax.devices()[0].platform, config.model.dtype)
    with locked_workdir(workdir), StartEntry(workdir) as entry, ProgressBar(config.total_steps) as bar:
        with bar.doing("loading"):
            stored, position = stored_config(workdir), newest_position(workdir)
            check_continuation(workdir, position, config)
            step = position.step if position is not None else 0
            bar.resume(step)
        if step == config.total_steps and not missing_samples(config, workdir, step):
            bar.log(f"finished at step {step:,}, nothing left to do")
            return
        doing = "loading the data" if is_prepared(config, workdir) else "preparing the data"
        with bar.doing(doing), entry.time.during("data preparation"):
            user_config, (config, stream) = config, open_stream(config, workdir, position)
        claim = functools.partial(write_config, user_config, workdir) if stored != user_config else lambda: None
        try:
            with (
                Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
                MetricsWriter(workdir, step) as writer,
            ):
                if jax.process_index() == 0:
                    remove_certificates(workdir, step)
                mesh = make_mesh(mesh_shape, jax.devices())
                run = Run(config, workdir, stream, mesh, checkpoints, writer, bar, entry, position, claim)
                run.run_schedule()
        except KeyboardInterrupt:
            saved = latest_whole_step(workdir / "checkpoints")
            on_disk = "no step is on disk yet" if saved is None else f"step {saved:,} is on disk"
            raise KeyboardInterrupt(f"stopped at step {bar.step:,}; {on_disk}") from None


def is_prepared(config: RunConfig, workdir: Path) -> bool:
    """Whether the run's token files exist."""
    return (data_directory(config, workdir) / META_FILE).exists()


def open_stream(config: RunConfig, workdir: Path, position: Position | None) -> tuple[RunConfig, TrainingStream]:
    """The config with the vocabulary of its data, and the training stream, checked to fill batches and validation.

    Data that this call prepared in the workdir and that are too small are removed: they would refuse the corrected
    command, which has other sources.
    """
    is_new = not is_prepared(config, workdir) and config.data.directory is None
    data = prepare(config.data, data_directory(config, workdir), mixtures=mixtures_of(config), progress=True)
    config = with_vocabulary(config, data)
    try:
        stream = TrainingStream.of_run(config, data)
        for stage in config.schedule:
            stream.check_size(stage.config.batch_size)
        stream.validation_rows(1)
    except ConfigError:
        if is_new:
            discard(data.directory)
        raise
    if config.sample_tokens:
        prompt_ids(config.sample_prompt, data.tokenizer, config.model.max_length)  # refuses one that is too long
    return config, continued_stream(workdir, position, stream)


def missing_samples(config: RunConfig, workdir: Path, step: int) -> bool:
    """Whether an interrupt prevented the text sample of the stage that ended at `step`."""
    written = {(line["kind"], line["step"]) for line in read_metrics(workdir)}
    return config.sample_tokens > 0 and ("sample", step) not in written


def run_stage(
    state: TrainState, spec: StateSpec, stage: Stage, rate: Callable[[int], float], batches: Iterator[dict[str, Any]]
) -> Iterator[Update]:
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
        train_step = jit_train_step(spec, stage.layout.microbatches, mask, stage.layout.overlap_collectives)
        while step < end:
            state, metrics = train_step(state, next(batches), np.float32(rate(step)))
            step += 1
            yield step, state, metrics


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


class Run:
    """A run in progress; its config has the tokenizer's vocabulary size."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        stream: TrainingStream,
        mesh: Mesh,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        bar: ProgressBar,
        entry: StartEntry,
        position: Position | None,
        claim: Callable[[], None],
    ) -> None:
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.checkpoints, self.writer, self.bar = checkpoints, writer, bar
        self.entry, self.time = entry, entry.time
        self.position, self.claim = position, claim
        self.first_sample = 0 if position is None else position.first_sample
        self.stream, self.tokenizer = stream, stream.prepared.tokenizer
        self.validation = self.stream.validation_set(config.evaluation_rows)
        if config.sample_tokens:
            self.prompt = prompt_ids(config.sample_prompt, self.tokenizer, config.model.max_length)
        if config.peak_flops is None:  # may be measured
            self.peak, self.peak_source = peak_flops(jax.devices()[0], config.model.dtype)
        else:
            self.peak, self.peak_source = config.peak_flops, "peak_flops of the config"
        entry.add(peak_flops=self.peak, peak_source=self.peak_source)
        # Newest values since the last line of metrics, without OF_ALL_ROWS; checkpoints keep them.
        self.newest: dict[str, float] = {} if position is None else position.newest_metrics

    def run_schedule(self) -> None:
        """Train every stage that is not finished, with growth between stages."""
        for line in data_warnings(self.stream.prepared.meta["sources"], self.stream.length):
            self.bar.log(f"warning: {line}")
        index, spec, state = self.start()
        for stage in self.config.schedule[index:]:
            if stage.index > index:
                with self.time.during("growth"):
                    spec, state = self.grow(stage, spec, state)
            if int(state.step) < stage.end:
                with self.time.during("updates"):
                    state = self.train_stage(state, spec, stage)
            elif not self.writer.has("sample", stage.end):  # an interrupt came between the last save and the sample
                self.write_sample(state, stage)

    def start(self) -> tuple[int, StateSpec, TrainState]:
        """(index of the stage, its spec, state) at the start of this process.

        The state comes from the first that exists: 1. this run's newest checkpoint, 2. initialisation.
        """
        position = self.position
        stage = self.config.schedule[0 if position is None else position.stage.index]
        spec = self.spec(stage)
        if position is None:
            state = init_state(spec, self.config.seed)
        else:
            state = from_items(restore_items(self.checkpoints, position.step, position.stage.model, spec, ITEMS))
        m = stage.model
        self.bar.log(
            f"{'start' if position is None else f'resume at step {position.step}'}: stage {stage.name}, "
            f"{count_parameters(state.params):,} parameters ({m.num_layers} layers x {m.embed_dim}, {m.num_heads} "
            f"heads, mlp {m.mlp_dim}), mesh {dict(self.mesh.shape)}"
        )
        self.bar.log(f"peak {self.peak:.3g} FLOP/s a device, {self.peak_source}")
        self.entry.add(first_step=int(state.step))
        return stage.index, spec, state

    def spec(self, stage: Stage) -> StateSpec:
        """Description of a stage's training state."""
        return state_spec(stage.model, self.config.optimizer, self.mesh)

    def train_stage(self, state: TrainState, spec: StateSpec, stage: Stage) -> TrainState:
        """Train to the stage's end; log, evaluate and save when due. Returns the state at the end."""
        first = self.first_sample + stage.samples_before(int(state.step))
        size = stage.config.batch_size
        host_batches = self.stream.batches(start=first, batch_size=size, **this_host())
        batches = (global_batch(batch, batch_sharding(self.mesh)) for batch in self.timed(host_batches))
        sums_of = jit_source_sums(stage.model, self.mesh, len(self.validation.labels))
        ramp = ramp_of(stage)
        unmask: Any = jax.jit(ramp.at, out_shardings=spec.shardings.params) if ramp is not None else None
        rate = functools.partial(learning_rate, self.config.stages)
        clock = Clock()
        pending: tuple[int, Metrics] | None = None
        updates = self.compiled(stage, run_stage(state, spec, stage, rate, batches))
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
                    params = unmask(state.params, step) if step in stage.ramp else state.params
                    self.evaluate(step, params, sums_of, stage)
                if opened:
                    self.bar.log(f"{stage.name} {step}: the growth mask is fully open; training continues without it")
                if save_due:
                    self.save(step, state, stage)
                clock.restart()
        self.write_sample(state, stage)
        with self.time.during("checkpoints"):
            self.checkpoints.wait()
        return state

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; the time that the run waits for them is that of data loading."""
        while True:
            with self.time.during("data loading"):
                batch = next(batches)
            yield batch

    def compiled(self, stage: Stage, updates: Iterator[Update]) -> Iterator[Update]:
        """The updates of a stage; the first compiles its program. Then nothing can refuse the config any more."""
        with self.bar.doing(f"compiling stage {stage.name}"), self.time.during("compilation"):
            first = next(updates)
        self.claim()
        self.entry.write(last_step=first[0])
        update: Update | None = first
        while update is not None:
            self.bar.step = update[0]
            self.entry.add(last_step=self.bar.step)
            yield update
            # After the mask has opened, the next update compiles the program without it.
            with self.time.during("compilation" if self.bar.step == stage.ramp.stop else "updates"):
                update = next(updates, None)

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
        parts = {kind: values[f"{kind}_loss"] for kind in ("language", "teacher") if f"{kind}_loss" in values}
        self.bar.update(step, stage.name, values["loss"], speed, parts)

    def evaluate(self, step: int, params: Params, sums_of: SourceSums, stage: Stage) -> None:
        """Compute and write the validation loss."""
        batch_size = stage.config.batch_size // stage.layout.microbatches
        with self.time.during("evaluation"):
            values = validation_loss(params, self.validation, sums_of, batch_size, self.mesh)
        self.write("validation", step, stage, **values)
        self.bar.log(f"{stage.name} {step}: {describe(values)}")

    def save(self, step: int, state: TrainState, stage: Stage) -> None:
        """Start writing a checkpoint."""
        meta = {
            "stage": stage.index,
            "samples_seen": self.first_sample + stage.samples_before(step),
            "fingerprint": self.stream.fingerprint,
            "newest_metrics": self.newest,
            "config": to_json(self.config),
        }
        with self.time.during("checkpoints"):
            self.checkpoints.save(step, to_items(state), meta)
        self.entry.write()

    def grow(self, stage: Stage, spec: StateSpec, state: TrainState) -> tuple[StateSpec, TrainState]:
        """Spec and state at the start of `stage`, grown and certified. The state before growth is already saved."""
        assert stage.previous is not None
        start, key, new = time.monotonic(), growth_key(self.config, stage.index), self.spec(stage)
        with self.bar.doing(f"growing into stage {stage.name}"):
            grown = grow_into(stage, state, (spec, new), key, self.stream, self.bar.log, self.first_sample)
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
        with self.time.during("samples"):
            ids = generate(state.params, stage.model, [self.prompt], self.config.sample_tokens, key)[0]
        text = self.tokenizer.decode(ids[len(self.prompt) :])
        step = int(state.step)
        prompt = self.config.sample_prompt
        self.writer.write("sample", step, stage=stage.name, prompt=prompt, text=text)
        self.writer.write_text(f"sample/{stage.name}", prompt + text, step)
        self.bar.log(f"{stage.name} {step}: text sample\n{textwrap.indent(printable(prompt + text), '    ')}")

    def write(self, kind: str, step: int, stage: Stage, **values: Any) -> None:
        """Write a line of metrics with the stage's name, and the tokens and FLOPs up to it."""
        tokens, flops = spent(stage, step)
        self.writer.write(kind, step, stage=stage.name, **values, tokens=tokens, flops=flops)
