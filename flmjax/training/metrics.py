"""What a run says about itself: FLOPs, metrics.jsonl and TensorBoard, reading them back, the line on the terminal."""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flmjax.config import ConfigError, ModelConfig, RunConfig, StageConfig, to_json
from flmjax.model.flops import flops_per_token
from flmjax.model.transformer import abstract_params, count_parameters
from flmjax.sharding.chips import chip_of
from flmjax.training.workdir import read_config

Record = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
SURROGATES = "backslashreplace"  # half a UTF-16 pair in a sample becomes a JSON escape instead of ending the run

# ---- FLOP/s of a device ---------------------------------------------------------------------------------------------


def peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """(FLOP/s that one device can reach in matrix multiplications of `dtype`, where the number comes from).

    Devices and types without a data sheet are measured, in float32. Fake host devices share one machine: measured
    alone, each gets all of it.
    """
    chip, dtype = chip_of(device.device_kind), jnp.dtype(dtype).name
    if chip is not None and dtype in ("bfloat16", "float32"):
        return getattr(chip, dtype), f"data sheet of {chip.kind}, {dtype}"
    return _measured_flops(device), f"measured: 1024 x 1024 float32 matrix multiplication on {device.device_kind}"


def _measured_flops(device: jax.Device, size: int = 1024, budget_seconds: float = 0.3) -> float:
    x = jax.device_put(np.full((size, size), 0.5, np.float32), device)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()  # compiles
    best, end = math.inf, time.perf_counter() + budget_seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# ---- metrics.jsonl and TensorBoard ----------------------------------------------------------------------------------


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and to the TensorBoard events in WORKDIR/tensorboard.

    A run that goes on from step s has written lines past s before it was cut off; they are removed on opening, so that
    the file holds one line per kind and step however often the run was interrupted.

    Args:
        workdir: made if absent.
        resume_step: updates done before this process starts; 0 for a fresh run.

    Raises:
        ConfigError: if a line of metrics.jsonl that is not the last one is not a metric line.
        OSError: if the folder cannot be written.
    """

    def __init__(self, workdir: Path, resume_step: int) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self._repeated = _truncate(workdir, resume_step)
        self._file = (workdir / METRICS_FILE).open("a", encoding="utf-8", errors=SURROGATES)
        # Imported here: it takes PyTorch along where that is installed.
        from tensorboardX import SummaryWriter

        # tensorboardX names files by the second and overwrites: a quick restart would lose the first one's events.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1, filename_suffix=suffix)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line {"kind": kind, "step": step, **values}; numbers go to TensorBoard too, as kind/name.

        Values are numbers, strings or None; arrays of one element count as numbers. JSON has no NaN and no infinity:
        both become null. What the step resumed from had left in the file already is not written again.
        """
        if (kind, step) in self._repeated:
            return
        line = {"kind": kind, "step": int(step), **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, global_step=line["step"])

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(workdir: Path) -> list[Record]:
    """The lines of WORKDIR/metrics.jsonl in order; [] without the file. A half-written last line is left out.

    Raises:
        ConfigError: naming an earlier line that is not a JSON object with "kind" and "step".
    """
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["kind"], record["step"] = str(record["kind"]), int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):  # a newline follows, so this line was written to its end
                raise ConfigError(f"{path}: line {number} is not a line of metrics: {line[:60]!r}") from error
        else:
            records.append(record)
    return records


def _truncate(workdir: Path, resume_step: int) -> set[tuple[str, int]]:
    """Remove lines past `resume_step` and a half line; returns (kind, step) of the lines kept at `resume_step`."""
    path = workdir / METRICS_FILE
    kept = [record for record in read_metrics(workdir) if record["step"] <= resume_step]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    if path.exists() and path.read_bytes() != text.encode(errors=SURROGATES):
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8", errors=SURROGATES) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)  # atomic: a kill leaves the old file or the new one
    return {(record["kind"], record["step"]) for record in kept if record["step"] == resume_step}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a scalar array of JAX or NumPy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- reading a run back ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What the metrics say of one stage that has begun."""

    model: ModelConfig
    parameters: int | None  # padding of the vocabulary included; None: vocabulary unknown
    config: StageConfig
    before: Record  # the line at its start: step, tokens and flops so far
    last: Record  # the line at its end, or the newest
    train: Record  # its last train line; without one it has no loss
    validation: Record


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir, read. The lists hold the lines of metrics.jsonl of one kind."""

    config: RunConfig
    config_json: Record
    train: list[Record]
    validation: list[Record]
    growth: list[Record]
    sample: list[Record]
    certificates: list[Record]
    gzip: float | None  # bits per byte of the held-out text
    last: Record  # the line with the most steps
    stages: list[StageResult]

    @property
    def training_seconds(self) -> float:
        """Time of the updates: each stage's tokens x the mean of 1 / (tokens per second) over its timed lines."""
        total = 0.0
        for stage in self.stages:
            own = [record for record in self.train if record["stage"] == stage.config.name]
            paces = [1 / record["tokens_per_second"] for record in own if record.get("tokens_per_second")]
            tokens = stage.last["tokens"] - stage.before["tokens"]
            if stage is not self.stages[0]:  # growth that learns is growth's time
                tokens -= stage.config.tuning_steps * stage.config.batch_size * stage.model.max_length
            total += tokens * sum(paces) / max(len(paces), 1)
        return total

    @property
    def flops_without_growth(self) -> float | None:
        """FLOPs had the newest stage's model seen all the tokens; None if nothing grew or the vocabulary is unknown."""
        model = self.stages[-1].model
        if len(self.stages) < 2 or model.vocab_size is None:
            return None
        return self.last["tokens"] * flops_per_token(model, model.max_length)


def read_run(workdir: Path) -> Run:
    """Read a workdir, of a run in progress too; pieces that are missing are None or empty.

    Raises:
        ConfigError: naming config.json or metrics.jsonl if it is absent, empty or unreadable.
    """
    config = read_config(workdir)
    stored_config = to_json(config)
    folder = Path(config.data.directory) if config.data.directory else workdir / "data"
    meta = _read_json(folder / "meta.json") or {}
    if config.model.vocab_size is None and "tokenizer" in meta:
        model = dataclasses.replace(config.model, vocab_size=meta["tokenizer"]["vocab_size"])
        config = dataclasses.replace(config, model=model)
    records = read_metrics(workdir)
    timed = [record for record in records if record["kind"] in ("train", "validation", "growth")]
    if not timed:
        raise ConfigError(f"{workdir / METRICS_FILE} is absent or empty; the run has not logged anything yet")
    stages = _stage_results(config, timed)
    if not stages:
        raise ConfigError(f"{workdir / METRICS_FILE} names no stage of {workdir / 'config.json'}")
    return Run(
        config=config,
        config_json=stored_config,
        **{k: [r for r in records if r["kind"] == k] for k in ("train", "validation", "growth", "sample")},
        certificates=[_read_json(path) or {} for path in sorted((workdir / "certificates").glob("step_*.json"))],
        gzip=meta.get("validation_gzip_bits_per_byte"),
        last=latest(timed),
        stages=stages,
    )


def _read_json(path: Path) -> Record | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def _stage_results(config: RunConfig, records: list[Record]) -> list[StageResult]:
    """One entry per stage that has a line of metrics; a line at a boundary ends one stage and begins the next."""
    starts = config.stage_starts()
    results = []
    for i, (stage, model) in enumerate(zip(config.stages, config.stage_models, strict=True)):
        own = [record for record in records if record["stage"] == stage.name]
        if not own:
            continue
        result = StageResult(
            model=model,
            parameters=None if model.vocab_size is None else count_parameters(abstract_params(model)[0]),
            config=stage,
            before=latest(records, starts[i]),
            last=latest(records, starts[i + 1]),
            train=latest([record for record in own if record["kind"] == "train"]),
            validation=latest([record for record in own if record["kind"] == "validation"]),
        )
        results.append(result)
    return results


def latest(records: list[Record], step: float = math.inf) -> Record:
    """The last line at or before `step`; one of step 0 if there is none."""
    before = [record for record in records if record["step"] <= step]
    return max(before, key=lambda record: record["step"], default={"step": 0, "tokens": 0, "flops": 0.0})


# ---- terminal -------------------------------------------------------------------------------------------------------


class Clock:
    """Time per step, without the step after a restart: that one may compile, or follows an evaluation."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._steps = 0

    def restart(self) -> None:
        """Forget what was timed."""
        self._start, self._steps = None, 0

    def tick(self) -> None:
        """A step's result has arrived."""
        if self._start is None:
            self._start = time.monotonic()
        else:
            self._steps += 1

    def rate(self, tokens: int) -> float | None:
        """Tokens per second since the last call, `tokens` a step; None if no whole step was timed."""
        if self._start is None or not self._steps:
            return None
        now = time.monotonic()
        rate = self._steps * tokens / max(now - self._start, 1e-9)
        self._start, self._steps = now, 0
        return rate


class ProgressBar:
    """Stage, step, loss, tokens/s and time left: a bar on a terminal, plain lines where stderr is a file or a pipe.

    Args:
        total: steps of the run.
        initial: steps done before this process started.
    """

    def __init__(self, total: int, initial: int = 0) -> None:
        self._total, self._initial, self._start = total, initial, time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:  # some containers say 0
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} < {remaining}{postfix}"
            self._bar = tqdm(total=total, initial=initial, dynamic_ncols=True, bar_format=layout)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, stage: str, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps of the run are done; off a terminal every call prints one line."""
        numbers = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        if self._bar is None:
            left = (time.monotonic() - self._start) / max(step - self._initial, 1) * (self._total - step)
            print(f"{stage} {step}/{self._total} {numbers}, {tqdm.format_interval(left)} left", flush=True)
            return
        self._bar.set_description_str(stage, refresh=False)
        self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update(step - self._bar.n)

    def log(self, text: str) -> None:
        """Print a line; a bar stays whole below it."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)
