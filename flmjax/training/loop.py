"""A run in progress: stages of training with growth between them."""

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from flmjax.config import RunConfig, Stage, to_json
from flmjax.data.batch import data_host
from flmjax.data.loader import TrainingStream
from flmjax.data.prepared import data_warnings
from flmjax.evaluation.generate import generate, prompt_ids
from flmjax.evaluation.validation_loss import describe, jit_source_sums, validation_loss
from flmjax.growth.certificate import GrowthPoint
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import ramp_of
from flmjax.model.transformer import count_parameters
from flmjax.optimizer.schedule import rates_of_stage
from flmjax.sharding.processes import from_writer
from flmjax.sharding.rules import batch_sharding
from flmjax.text_table import printable
from flmjax.training.growth_point import grow_into, growth_key, prove_growth
from flmjax.training.pending import PendingMetrics
from flmjax.training.prefetch import on_devices
from flmjax.training.profiling import PROFILE_FOLDER, traced
from flmjax.training.run_metrics import RunMetrics
from flmjax.training.spikes import LossWatch
from flmjax.training.state import StateSpec, TrainState, init_state, state_spec, to_items
from flmjax.training.step import Update, jit_parameter_norms, jit_stage_step
from flmjax.training.stopping import Stopping
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.local_copy import WorkingCopy
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.position import Position
from flmjax.workdir.progress import Clock, ProgressBar
from flmjax.workdir.starts import StartEntry


def run_stage(
    state: TrainState,
    spec: StateSpec,
    stage: Stage,
    rate: Callable[[int], float],
    batches: Iterator[dict[str, Any]],
    loss_limit: Callable[[int], float] | None = None,
) -> Iterator[Update]:
    """Yield (step, state, metrics on the device) after each update until the stage's end.

    The state is donated to the next update: the caller must not use it after it resumes the generator.

    Args:
        rate: update n = 0, 1, ... of the run -> learning rate.
        batches: batches on the devices.
        loss_limit: number n = 1, 2, ... of an update -> loss above which the update is skipped; None: no limit.
    """
    step = int(state.step)
    ramp = ramp_of(stage)
    phases = [(ramp, ramp.end)] if ramp is not None else []
    for mask, end in [*phases, (None, stage.end)]:
        if step >= end:  # resumed after the mask was removed
            continue
        train_step = jit_stage_step(spec, stage.layout, mask, loss_limit is not None)
        while step < end:
            scalars = [np.float32(rate(step)), *([] if loss_limit is None else [np.float32(loss_limit(step + 1))])]
            state, metrics = train_step(state, next(batches), *scalars)
            step += 1
            yield step, state, metrics


def mesh_words(mesh: Mesh) -> str:
    """`replica 2 x fsdp 4 x tensor 1`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


class Session(NamedTuple):
    """What all attempts of a process to go on with a run share, from the start of `flmjax train` to its end.

    Attributes:
        config: the run's config; in an attempt that trains it has the tokenizer's vocabulary size.
        copy: the run's folder, locked, or the local copy of that on object storage.
        meshes: the mesh of every stage.
        bar: the progress on the terminal.
        stopping: the early stop by a signal or a time limit.
        profile: range(START, STOP): updates START + 1 to STOP are traced; None: no trace.
    """

    config: RunConfig
    copy: WorkingCopy
    meshes: Sequence[Mesh]
    bar: ProgressBar
    stopping: Stopping
    profile: range | None


class Run:
    """A run in progress.

    Args:
        claim: makes the workdir that of the run, once the first update is made.
        position: of the checkpoint that the run goes on from; None: it starts.
        state: the state at `position`.
    """

    def __init__(
        self,
        session: Session,
        stream: TrainingStream,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        entry: StartEntry,
        claim: Callable[[], None],
        position: Position | None,
        state: TrainState | None,
    ) -> None:
        self.config, copy, self.meshes, self.bar, self.stopping, self.profile = session
        self.workdir = copy.folder
        self.checkpoints, self.writer, self.entry, self.time = checkpoints, writer, entry, entry.time
        self.claim, self.position, self.restored = claim, position, state
        self.saved_at = time.monotonic()
        self.first_sample = 0 if position is None else position.first_sample
        self.watch = LossWatch.of_run(self.config, position)
        newest = {} if position is None else position.newest_metrics
        self.metrics = RunMetrics(self.config, writer, self.bar, entry.heartbeat, newest, self.watch)
        entry.add(peak_flops=self.metrics.peak, peak_source=self.metrics.peak_source)
        self.stream, self.tokenizer = stream, stream.prepared.tokenizer
        self.validation = self.stream.validation_set(self.config.evaluation_rows)
        if self.config.sample_tokens:
            self.prompt = prompt_ids(self.config.sample_prompt, self.tokenizer, self.config.model.max_length)

    def run_schedule(self) -> None:
        """Train every stage that is not finished, with growth between stages."""
        for line in data_warnings(self.stream.prepared.meta["sources"], self.stream.length):
            self.bar.log(f"warning: {line}")
        index, spec, state = self.start()
        self.stop_if_requested()
        self.catch_up(state, spec, self.config.schedule[index])
        for stage in self.config.schedule[index:]:
            if stage.index > index:
                self.stop_if_requested()
                with self.time.during("growth"):
                    spec, state = self.grow(stage, spec, state)
                self.stop_if_requested()
            if int(state.step) < stage.end:
                batches = self.batches(int(state.step), spec, stage)
                with self.time.during("updates"), contextlib.closing(batches):
                    state = self.train_stage(state, spec, stage, batches)
            elif not from_writer(self.writer.has("sample", stage.end)):  # a stop came between the last save and it
                self.write_sample(state, stage)

    def stop_if_requested(self) -> None:
        """Stop the run here if a signal or the time limit requests it; it goes on from its newest checkpoint."""
        if self.stopping.reached():
            raise self.stopping.stopped

    def catch_up(self, state: TrainState, spec: StateSpec, stage: Stage) -> None:
        """Evaluate the restored state if a stop came before its evaluation."""
        step = int(state.step)
        is_due = step > stage.start and (step == stage.end or step % self.config.evaluate_every == 0)
        if is_due and not from_writer(self.writer.has("validation", step)):
            self.evaluator(stage, spec)(step, state)

    def start(self) -> tuple[int, StateSpec, TrainState]:
        """(index of the stage, its spec, state) at the start of this process.

        The state comes from the first that exists: 1. this run's newest checkpoint, 2. initialisation.
        """
        position = self.position
        stage = self.config.schedule[0 if position is None else position.stage.index]
        spec = self.spec(stage)
        state = init_state(spec, self.config.seed) if self.restored is None else self.restored
        self.restored = None  # it is donated to the first update
        m = stage.model
        self.bar.log(
            f"{'start' if position is None else f'resume at step {position.step}'}: stage {stage.name}, "
            f"{count_parameters(state.params):,} parameters ({m.num_layers} layers x {m.embed_dim}, {m.num_heads} "
            f"heads, mlp {m.mlp_dim}), mesh {mesh_words(spec.mesh)}"
        )
        self.bar.log(f"peak {self.metrics.peak:.3g} FLOP/s a device, {self.metrics.peak_source}")
        return stage.index, spec, state

    def spec(self, stage: Stage) -> StateSpec:
        """Description of a stage's training state."""
        return state_spec(stage.model, self.config.optimizer, self.meshes[stage.index])

    def batches(self, step: int, spec: StateSpec, stage: Stage) -> grain.DatasetIterator[dict[str, Any]]:
        """Batches of a stage on the devices, from that of update `step` + 1 of the run on."""
        first = self.first_sample + stage.samples_before(step)
        size, sharding = stage.config.batch_size, batch_sharding(spec.mesh)
        host_batches = self.stream.batch_dataset(start=first, batch_size=size, **data_host(sharding, size))
        return on_devices(host_batches, sharding)

    def train_stage(
        self, state: TrainState, spec: StateSpec, stage: Stage, batches: Iterator[dict[str, Any]]
    ) -> TrainState:
        """Train to the stage's end; log, evaluate and save when due. Returns the state at the end."""
        ramp, evaluate = ramp_of(stage), self.evaluator(stage, spec)
        rate = rates_of_stage(self.config.stages, stage.index)
        norms, norms_every = jit_parameter_norms(spec), self.config.norms_every
        clock, pending = Clock(), PendingMetrics(self.config.log_every)
        updates = self.compiled(stage, run_stage(state, spec, stage, rate, self.timed(batches), self.watch.loss_limit))
        if self.profile is not None:
            folder = self.workdir / PROFILE_FOLDER
            updates = traced(updates, int(state.step), stage, self.profile, folder, self.bar.log)
        for step, state, metrics in updates:
            self.watch.dispatched(step, metrics)
            if norms_every is not None and step % norms_every == 0:
                metrics |= {"parameter_norms": norms(state.params)}
            for update in pending.add(step, metrics):
                self.metrics.log(update, stage, spec, clock)
            last, opened = step == stage.end, ramp is not None and step == ramp.end
            save_due = self.is_save_due(step, stage)
            evaluation_due = last or step % self.config.evaluate_every == 0
            is_stopped = self.stopping.reached()
            if save_due or evaluation_due or opened or is_stopped:
                for update in pending.flush():
                    self.metrics.log(update, stage, spec, clock)
                if evaluation_due and not is_stopped:  # there may be no time: the run evaluates when it goes on
                    evaluate(step, state)
                    is_stopped = self.stopping.reached()
                if opened:
                    self.bar.log(f"{stage.name} {step}: the growth mask is fully open; training continues without it")
                if save_due or is_stopped:
                    self.save(step, state, stage)
                if is_stopped:
                    self.checkpoints.wait()
                    raise self.stopping.stopped
                clock.restart()
        self.write_sample(state, stage)
        with self.time.during("checkpoints"):
            self.checkpoints.wait()
        return state

    def timed(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
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
            self.entry.updated(self.bar.step)
            yield update
            # After the mask has opened, the next update compiles the program without it.
            with self.time.during("compilation" if self.bar.step == stage.ramp.stop else "updates"):
                update = next(updates, None)

    def is_save_due(self, step: int, stage: Stage) -> bool:
        """Whether the state after update `step` of the run is saved.

        The first update after a growth is saved too. Before it, the newest checkpoint is that of the old model, and a
        resumed run would grow again.
        """
        is_after_growth = stage.previous is not None and step == stage.start + 1
        is_due = step == stage.end or step % self.config.checkpoint.every == 0 or is_after_growth
        return is_due or (step % self.config.log_every == 0 and self.are_minutes_over())

    def are_minutes_over(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save, by the clock of process 0.

        All processes call it together: they save together, and clocks that disagree would let them wait for ever.
        """
        limit = self.config.checkpoint.every_minutes
        if limit is None:
            return False
        is_over = (time.monotonic() - self.saved_at) / 60 >= limit
        return bool(from_writer(is_over))

    def evaluator(self, stage: Stage, spec: StateSpec) -> Callable[[int, TrainState], None]:
        """The function (step, state) that computes and writes the validation loss of a stage's model."""
        sums_of = jit_source_sums(stage.model, spec.mesh, len(self.validation.labels))
        ramp, batch_size = ramp_of(stage), stage.config.batch_size // stage.layout.microbatches
        unmask: Any = jax.jit(ramp.at, out_shardings=spec.shardings.params) if ramp is not None else None

        def evaluate(step: int, state: TrainState) -> None:
            with self.time.during("evaluation"):
                params = unmask(state.params, step) if step in stage.ramp else state.params
                values = validation_loss(params, self.validation, sums_of, batch_size, spec.mesh)
            self.metrics.write("validation", step, stage, **values)
            self.bar.log(f"{stage.name} {step}: {describe(values)}")

        return evaluate

    def save(self, step: int, state: TrainState, stage: Stage) -> None:
        """Start writing a checkpoint."""
        meta = {
            "stage": stage.index,
            "samples_seen": self.stream.samples_passed(self.first_sample + stage.samples_before(step)),
            "skipped_samples": [str(skipped) for skipped in self.stream.skipped],
            "fingerprint": self.stream.fingerprint,
            "newest_metrics": self.metrics.newest,
            "recent_losses": self.watch.stored_losses,
            "config": to_json(self.config),
        }
        with self.time.during("checkpoints"):
            self.checkpoints.save(step, to_items(state), meta)
        self.saved_at = time.monotonic()
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
        meshes = (spec.mesh, new.mesh)
        if spec.mesh != new.mesh:
            self.bar.log(f"{stage.name}: mesh {mesh_words(spec.mesh)} -> {mesh_words(new.mesh)}")
        prove_growth(self.config, self.workdir, self.stream, meshes, pair, growth, point, self.bar.log)
        self.watch.after_growth(stage)
        self.metrics.write("growth", point.step, stage, from_stage=point.from_stage, seconds=time.monotonic() - start)
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
