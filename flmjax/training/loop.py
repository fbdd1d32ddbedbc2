"""A run: stages of training with growth between them, started or gone on with by the same call."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flmjax.config import ConfigError, ModelConfig, RunConfig, to_json
from flmjax.config.validate import validate, validate_mesh
from flmjax.data.batch import Batch
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import Prepared, with_vocabulary
from flmjax.evaluation.generate import generate
from flmjax.growth.certificate import Certificate, certify
from flmjax.growth.learned import tune, tuning_flops
from flmjax.growth.masks import Ramp
from flmjax.hardware import peak_flops
from flmjax.model.flops import FLOPS_CONVENTION, flops_per_token
from flmjax.model.loss import teacher_means
from flmjax.model.transformer import count_parameters
from flmjax.optimizer.schedule import learning_rate, new_warmup
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement, whole_rows
from flmjax.training.state import StateSpec, TrainState, from_items, init_state, state_spec, to_items
from flmjax.training.step import (
    compile_evaluation,
    compile_growth,
    compile_step,
    divisor,
    gradients,
    nonfinite_leaves,
    put_batch,
)
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.paths import claim_workdir, data_directory
from flmjax.workdir.progress import Clock, ProgressBar

METRICS = ("loss", "bits_per_byte", "gradient_norm", "language_loss", "teacher_loss", "judgement_accuracy")
OF_ALL_ROWS = ("loss", "gradient_norm")  # the others are of the text's rows or the teachers', NaN for a batch without


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step and why. The last checkpoint is intact."""


def train(config: RunConfig, workdir: Path) -> None:
    """Run the schedule in `workdir`, from wherever it stands there to its end.

    Raises:
        ConfigError: a setting, a source or a workdir that does not fit. CheckpointError, GrowthError, TrainingError.
    """
    validate(config)
    mesh_config = validate_mesh(config, jax.device_count())
    claim_workdir(config, workdir)
    data = prepare(config.data, data_directory(config, workdir), progress=True)
    config = with_vocabulary(config, data)
    mesh = make_mesh(mesh_config, jax.devices())
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        step = checkpoints.latest_step() or 0
        with MetricsWriter(workdir, step) as writer, ProgressBar(config.total_steps, step) as bar:
            Run(config, workdir, data, mesh, checkpoints, writer, bar).run_schedule()


def run_stage(
    state: TrainState, spec: StateSpec, config: RunConfig, index: int, rows: Iterator[Batch], data: Any
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Yield (steps done, state, metrics on the device) after each update until the stage's end.

    The state is donated to the next update: a caller must be done with it before it asks for more.
    """
    stage, step = config.stages[index], int(state.step)
    warmup = new_warmup(stage)  # also of a first stage: a checkpoint may have grown before the run
    ramp = stage_ramp(config, index)
    phases = [(ramp, ramp.end)] if ramp is not None else []
    for ramp, end in [*phases, (None, config.stage_starts()[index + 1])]:
        if step >= end:  # gone on with after the mask
            continue
        train_step = compile_step(spec, stage.microbatches, warmup, ramp)
        while step < end:
            batch = put_batch(next(rows), data.tokenizer.token_bytes, spec.mesh)
            state, metrics = train_step(state, batch, np.float32(learning_rate(config.stages, step)))
            step += 1
            yield step, state, metrics


def stage_ramp(config: RunConfig, index: int) -> Ramp | None:
    """The mask that opens during a stage, if its growth has one."""
    stage = config.stages[index]
    if index == 0 or stage.growth.family != "mask":
        return None
    old, new = config.stage_models[index - 1 : index + 1]
    return Ramp(stage.growth, old, new, config.stage_starts()[index])


class Run:
    """What a run holds while it goes; `config` has its vocabulary."""

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
        self.config, self.workdir, self.data, self.mesh = config, workdir, data, mesh
        self.checkpoints, self.writer, self.bar = checkpoints, writer, bar
        self.length = config.model.max_length
        self.stream = TrainingStream.of_run(config, data)
        self.peak, self.peak_source = peak_flops(jax.devices()[0], config.model.dtype)
        if config.peak_flops is not None:
            self.peak, self.peak_source = config.peak_flops, "peak_flops of the config"
        self.validation = self.stream.validation_rows(config.evaluation_rows)
        self.newest: dict[str, float] = {}  # since the last line, of each but OF_ALL_ROWS

    def run_schedule(self) -> None:
        """Train every stage that is not done, growing between them."""
        for stage in self.config.stages:
            self.stream.check_size(stage.batch_size)
        index, spec, state = self.start()
        while True:
            if int(state.step) < self.config.stage_starts()[index + 1]:
                state = self.train_stage(state, spec, index)
            if index + 1 == len(self.config.stages):
                return
            spec, state = self.grow_into(index + 1, state)
            index += 1

    def start(self) -> tuple[int, StateSpec, TrainState]:
        """(stage, its spec, state), from the first that exists: 1. this run's newest checkpoint, 2. scratch."""
        step = self.checkpoints.latest_step()
        if step is None:
            spec = self.spec(0)
            state, index = init_state(spec, self.config.seed), 0
            self.bar.log(f"start: {self.describe(0, state)}")
        else:
            meta = self.checkpoints.meta(step)
            if meta["fingerprint"] != self.stream.fingerprint:
                raise ConfigError(
                    f"{self.workdir}: the data or its mixture is not that of the checkpoint at step {step} "
                    f"(fingerprint {self.stream.fingerprint[:12]}, there {meta['fingerprint'][:12]})"
                )
            index = meta["stage"]
            spec = self.spec(index)
            state = from_items(self.checkpoints.restore(step, to_items(spec.abstract)))
            self.bar.log(f"go on from step {step}: {self.describe(index, state)}")
        self.bar.log(f"peak {self.peak:.3g} FLOP/s a device ({self.peak_source}); {FLOPS_CONVENTION}")
        return index, spec, state

    def spec(self, index: int) -> StateSpec:
        """Description of a stage's state."""
        return state_spec(self.config.stage_models[index], self.config.optimizer, self.mesh)

    def describe(self, index: int, state: TrainState) -> str:
        """One line on a stage's model."""
        m = self.config.stage_models[index]
        return (
            f"stage {self.config.stages[index].name}, {count_parameters(state.params):,} parameters ({m.num_layers} "
            f"layers x {m.embed_dim}, {m.num_heads} heads, mlp {m.mlp_dim}), mesh {dict(self.mesh.shape)}"
        )

    def progress(self, step: int, index: int) -> dict[str, float]:
        """Tokens and model FLOPs spent in the first `step` steps, growth into stage `index` included if that learns:
        a function of the config alone."""
        tokens, flops = 0, 0.0
        models = self.config.stage_models
        for i, stage in enumerate(self.config.stages[: index + 1]):
            tuning = stage.tuning_steps if i else 0
            steps = min(max(step - self.config.stage_starts()[i], 0), stage.steps)
            tokens += (steps + tuning) * stage.batch_size * self.length
            flops += (steps + tuning) * stage.batch_size * self.length * flops_per_token(models[i], self.length)
            flops += tuning * tuning_flops(models[i - 1], models[i]) if tuning else 0.0
        return {"tokens": tokens, "flops": flops}

    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """Batches of `size` rows from the stream's sample `start` on; of each, this process's part."""
        hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
        return self.stream.batches(start=start, batch_size=size, **hosts)

    def samples(self, step: int, index: int) -> int:
        """Samples consumed in the first `step` steps."""
        return int(self.progress(step, index)["tokens"]) // self.length

    def train_stage(self, state: TrainState, spec: StateSpec, index: int) -> TrainState:
        """Train to the stage's end, logging, evaluating and saving when due."""
        stage = self.config.stages[index]
        end = self.config.stage_starts()[index + 1]
        rows = self.batches(self.samples(int(state.step), index), stage.batch_size)
        evaluate = compile_evaluation(spec)
        ramp = stage_ramp(self.config, index)
        unmask = jax.jit(ramp.at, out_shardings=spec.shardings.params) if ramp is not None else None
        clock = Clock()
        pending: tuple[int, dict[str, jax.Array]] | None = None
        updates = run_stage(state, spec, self.config, index, rows, self.data)
        for step, state, metrics in updates:
            # Fetched while the next update computes.
            if pending is not None:
                self.log(*pending, index, spec, clock)
            pending = (step, metrics)
            last, opened = step == end, ramp is not None and step == ramp.end
            due = step % self.config.evaluate_every == 0 or last
            if last or due or opened or step % self.config.checkpoint.every == 0:
                self.log(*pending, index, spec, clock)
                pending = None
                if due:
                    params = state.params
                    if unmask is not None and ramp is not None and step < ramp.end:
                        params = unmask(params, step)
                    self.evaluate(step, params, evaluate, index)
                if opened:
                    self.bar.log(f"{stage.name} {step}: the mask is open and gone")
                if last or step % self.config.checkpoint.every == 0:
                    self.save(step, state, index)
                clock.restart()
        self.write_sample(state, index)
        self.checkpoints.wait()
        return state

    def log(self, step: int, metrics: dict[str, jax.Array], index: int, spec: StateSpec, clock: Clock) -> None:
        """Check one step's metrics, and write them if due."""
        skipped = int(metrics["skipped_updates"])
        clock.tick()
        if skipped:
            leaves = nonfinite_leaves(np.asarray(metrics["finite"]), spec.abstract.params) or ["the loss"]
            text = f"step {step}: update skipped, not finite: {', '.join(leaves[:3])} ({skipped} in a row)"
            self.bar.log(text)
            if skipped >= self.config.optimizer.max_skipped_updates:
                raise TrainingError(f"{text}; stopped, parameters are those of step {step - skipped}")
        if "teacher_loss" in metrics:
            of_kinds = {name: float(metrics[name]) for name in METRICS if name not in OF_ALL_ROWS}
            self.newest |= {name: x for name, x in of_kinds.items() if not np.isnan(x)}
        stage = self.config.stages[index]
        if step % self.config.log_every and step != self.config.stage_starts()[index + 1] and not skipped:
            return
        tokens = stage.batch_size * self.length
        rate = clock.rate(tokens)
        values = {name: float(metrics[name]) for name in METRICS if name in metrics}  # the last three: with teachers
        if not skipped:  # where batches alternate, a line has the newest batch of either kind
            values |= self.newest
        self.newest = {}
        flops = flops_per_token(spec.config, self.length)
        self.writer.write(
            "train",
            step,
            stage=stage.name,
            **values,
            learning_rate=learning_rate(self.config.stages, step - 1),
            **self.progress(step, index),
            tokens_per_second=rate,
            model_flops_utilization=None if rate is None else rate * flops / (self.peak * self.mesh.size),
            skipped_updates=skipped,
        )
        self.bar.update(step, stage.name, values["loss"], rate or 0.0)

    def evaluate(self, step: int, params: Any, evaluate: Any, index: int) -> None:
        """Loss on the held-out rows.

        Where there are teachers, "loss" is still that of the language rows, so that it compares with a run without
        them and with bits_per_byte; the teachers' rows have teacher_loss, and judgement_accuracy of `judged` targets.
        """
        rows = -(-self.config.stages[index].batch_size // self.config.stages[index].microbatches)
        sums: dict[str, Any] = {}
        for batch in chunks(self.validation, rows):
            found = evaluate(params, put_batch(batch, self.data.tokenizer.token_bytes, self.mesh))
            sums = {name: sums.get(name, 0.0) + np.float64(value) for name, value in found.items()}
        values, name = validation_means(sums), self.config.stages[index].name
        self.writer.write("validation", step, stage=name, **values, **self.progress(step, index))
        text = f"validation loss {values['loss']:.4f} nats a token, {values['bits_per_byte']:.4f} bits a byte"
        if "judged" in values:
            text += f", judgement accuracy {100 * values['judgement_accuracy']:.1f} % of {values['judged']}"
        self.bar.log(f"{name} {step}: {text}")

    def save(self, step: int, state: TrainState, index: int) -> None:
        """Start writing a checkpoint."""
        meta = {
            "stage": index,
            "samples_seen": self.samples(step, index),
            "fingerprint": self.stream.fingerprint,
            "config": to_json(self.config),
        }
        self.checkpoints.save(step, to_items(state), meta)

    def grow_into(self, index: int, state: TrainState) -> tuple[StateSpec, TrainState]:
        """Grow to stage `index`, prove it, and store the proof. The checkpoint before it is on disk already."""
        start = time.monotonic()
        step, stage = int(state.step), self.config.stages[index]
        old, new = self.config.stage_models[index - 1 : index + 1]
        spec = self.spec(index)
        key = jax.random.fold_in(jax.random.key(self.config.seed), index + 1)
        grown = compile_growth(self.spec(index - 1), spec, stage.growth)(state, key)
        if stage.tuning_steps:
            grown = dataclasses.replace(grown, params=self.tune(state.params, spec, index, key))
        certificate = prove_growth(
            self.config,
            self.workdir,
            self.stream,
            self.mesh,
            (state.params, grown.params),
            (old, new),
            self.bar.log,
            operator=stage.growth,
            key=key,
            step=step,
            from_stage=self.config.stages[index - 1].name,
            to_stage=stage.name,
        )
        self.writer.write(
            "growth",
            step,
            stage=stage.name,
            from_stage=certificate.from_stage,
            **self.progress(step, index),
            seconds=time.monotonic() - start,
        )
        return spec, grown

    def tune(self, params: Any, spec: StateSpec, index: int, key: jax.Array) -> Any:
        """Parameters of stage `index` by growth that learns on the batches before the stage's first."""
        stage, models = self.config.stages[index], self.config.stage_models
        rows = self.batches(self.samples(self.config.stage_starts()[index], index - 1), stage.batch_size)
        token_bytes = self.data.tokenizer.token_bytes
        model = dataclasses.replace(spec.config, dropout=0.0)

        def value_and_grad(params: Any, batch: Any) -> tuple[jax.Array, Any]:
            sums, grads = gradients(params, batch, key, model, Placement(self.mesh), stage.microbatches)
            return sums["loss"] / divisor(sums["weight"]), grads

        placed = (put_batch(row, token_bytes, self.mesh) for row in itertools.islice(rows, stage.tuning_steps))
        arguments = (params, models[index - 1], models[index], stage.growth, key, value_and_grad, placed)
        params, losses = tune(*arguments, shardings=spec.shardings.params)
        self.bar.log(
            f"growth learned in {stage.tuning_steps} updates on {stage.tuning_steps * stage.batch_size:,} samples: "
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        )
        return params

    def write_sample(self, state: TrainState, index: int) -> None:
        """A text sample of the stage's last model."""
        if not self.config.sample_tokens:
            return
        tokenizer, model = self.data.tokenizer, self.config.stage_models[index]
        prompt = tokenizer.encode(self.config.sample_prompt)
        key = jax.random.key(self.config.seed)
        ids = generate(state.params, model, [prompt], self.config.sample_tokens, key)[0]
        text = tokenizer.decode([i for i in ids[len(prompt) :] if i != tokenizer.end_id])
        step, name = int(state.step), self.config.stages[index].name
        self.writer.write("sample", step, stage=name, prompt=self.config.sample_prompt, text=text)


def prove_growth(
    config: RunConfig,
    workdir: Path,
    stream: TrainingStream,
    mesh: Mesh,
    params: tuple[Any, Any],
    models: tuple[ModelConfig, ModelConfig],
    log: Callable[[str], None],
    **labels: Any,
) -> Certificate:
    """Certify growth from the first of `params` and `models` to the second, on validation rows of the first's length.

    The certificate is stored, also one that fails: GrowthError is raised after that.
    """
    size = whole_rows(config.certificate_rows, mesh)
    stream = dataclasses.replace(stream, length=models[0].max_length)
    rows = next(chunks(stream.validation_rows(size), size))
    certificate = certify(
        *params,
        *models,
        put_batch(rows, stream.prepared.tokenizer.token_bytes, mesh),
        placement=Placement(mesh),
        float64_below=config.certificate_float64_below,
        tolerance=config.certificate_tolerance,
        **labels,
    )
    log(str(certificate))
    if jax.process_index() == 0:
        certificate.save(workdir / "certificates")
    certificate.check()
    return certificate


def validation_means(sums: dict[str, np.float64]) -> dict[str, Any]:
    """What a line of validation says of its sums."""
    if "judged" not in sums:
        return {"loss": sums["loss"] / sums["weight"], "bits_per_byte": sums["loss"] / np.log(2) / sums["bytes"]}
    with np.errstate(invalid="ignore"):  # NaN: there is no row of that kind
        means = teacher_means(sums)
    return {
        "loss": means.pop("language_loss"),
        **means,
        "judged": int(sums["judged"]) // jax.process_count(),  # every process has all rows
    }


def chunks(rows: Batch, size: int) -> Iterator[Batch]:
    """Parts of `size` rows; the last is filled up with rows of weight 0."""
    total = len(rows["weights"])
    for start in range(0, total, size):
        index = np.arange(start, start + size)
        part: Batch = jax.tree.map(lambda x, places=index % total: x[places], rows)
        part["weights"] = part["weights"] * (index < total)[:, None].astype(np.float32)
        yield part
