"""A run in progress: stages of training with growth between them."""

import functools
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flmjax.config import RunConfig, Stage, to_json
from flmjax.data.batch import Batch, data_host, global_batch
from flmjax.data.loader import TrainingStream
from flmjax.data.prepared import data_warnings
from flmjax.evaluation.generate import generate, prompt_ids
from flmjax.evaluation.validation_loss import SourceSums, describe, jit_source_sums, validation_loss
from flmjax.growth.certificate import GrowthPoint
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import ramp_of
from flmjax.model.transformer import count_parameters
from flmjax.optimizer.schedule import learning_rate
from flmjax.sharding.axes import Params
from flmjax.sharding.processes import from_writer
from flmjax.sharding.rules import batch_sharding
from flmjax.text_table import printable
from flmjax.training.growth_point import grow_into, growth_key, prove_growth
from flmjax.training.pending import PendingMetrics
from flmjax.training.run_metrics import RunMetrics
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
from flmjax.training.step import jit_stage_step
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.position import Position
from flmjax.workdir.progress import Clock, ProgressBar
from flmjax.workdir.starts import StartEntry

Metrics = dict[str, jax.Array]
Update = tuple[int, TrainState, Metrics]  # updates of the run so far, state and metrics after the last of them


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
        train_step = jit_stage_step(spec, stage.layout, mask)
        while step < end:
            state, metrics = train_step(state, next(batches), np.float32(rate(step)))
            step += 1
            yield step, state, metrics


def mesh_words(mesh: Mesh) -> str:
    """`replica 2 x fsdp 4 x tensor 1`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


class Run:
    """A run in progress; its config has the tokenizer's vocabulary size."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        stream: TrainingStream,
        meshes: Sequence[Mesh],
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        bar: ProgressBar,
        entry: StartEntry,
        position: Position | None,
        claim: Callable[[], None],
    ) -> None:
        self.config, self.workdir, self.meshes = config, workdir, meshes
        self.checkpoints, self.writer, self.bar = checkpoints, writer, bar
        self.entry, self.time = entry, entry.time
        self.position, self.claim = position, claim
        self.saved_at = time.monotonic()
        self.first_sample = 0 if position is None else position.first_sample
        self.metrics = RunMetrics(config, writer, bar, {} if position is None else position.newest_metrics)
        entry.add(peak_flops=self.metrics.peak, peak_source=self.metrics.peak_source)
        self.stream, self.tokenizer = stream, stream.prepared.tokenizer
        self.validation = self.stream.validation_set(config.evaluation_rows)
        if config.sample_tokens:
            self.prompt = prompt_ids(config.sample_prompt, self.tokenizer, config.model.max_length)

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
            f"heads, mlp {m.mlp_dim}), mesh {mesh_words(spec.mesh)}"
        )
        self.bar.log(f"peak {self.metrics.peak:.3g} FLOP/s a device, {self.metrics.peak_source}")
        self.entry.add(first_step=int(state.step))
        return stage.index, spec, state

    def spec(self, stage: Stage) -> StateSpec:
        """Description of a stage's training state."""
        return state_spec(stage.model, self.config.optimizer, self.meshes[stage.index])

    def train_stage(self, state: TrainState, spec: StateSpec, stage: Stage) -> TrainState:
        """Train to the stage's end; log, evaluate and save when due. Returns the state at the end."""
        first = self.first_sample + stage.samples_before(int(state.step))
        size, sharding = stage.config.batch_size, batch_sharding(spec.mesh)
        host_batches = self.stream.batches(start=first, batch_size=size, **data_host(sharding, size))
        batches = (global_batch(batch, sharding) for batch in self.timed(host_batches))
        sums_of = jit_source_sums(stage.model, spec.mesh, len(self.validation.labels))
        ramp = ramp_of(stage)
        unmask: Any = jax.jit(ramp.at, out_shardings=spec.shardings.params) if ramp is not None else None
        rate = functools.partial(learning_rate, self.config.stages)
        clock, pending = Clock(), PendingMetrics(self.config.log_every)
        updates = self.compiled(stage, run_stage(state, spec, stage, rate, batches))
        for step, state, metrics in updates:
            for update in pending.add(step, metrics):
                self.metrics.log(update, stage, spec, clock)
            last, opened = step == stage.end, ramp is not None and step == ramp.end
            save_due = self.is_save_due(step, stage)
            evaluation_due = last or step % self.config.evaluate_every == 0
            if save_due or evaluation_due or opened:
                for update in pending.flush():
                    self.metrics.log(update, stage, spec, clock)
                if evaluation_due:
                    params = unmask(state.params, step) if step in stage.ramp else state.params
                    self.evaluate(step, params, sums_of, stage, spec.mesh)
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

    def evaluate(self, step: int, params: Params, sums_of: SourceSums, stage: Stage, mesh: Mesh) -> None:
        """Compute and write the validation loss."""
        batch_size = stage.config.batch_size // stage.layout.microbatches
        with self.time.during("evaluation"):
            values = validation_loss(params, self.validation, sums_of, batch_size, mesh)
        self.metrics.write("validation", step, stage, **values)
        self.bar.log(f"{stage.name} {step}: {describe(values)}")

    def save(self, step: int, state: TrainState, stage: Stage) -> None:
        """Start writing a checkpoint."""
        meta = {
            "stage": stage.index,
            "samples_seen": self.first_sample + stage.samples_before(step),
            "fingerprint": self.stream.fingerprint,
            "newest_metrics": self.metrics.newest,
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
