"""A run read back from its workdir."""

import dataclasses
import json
import math
from pathlib import Path

from flmjax.config import ConfigError, ModelConfig, RunConfig, StageConfig, to_json
from flmjax.model.flops import flops_per_token
from flmjax.model.transformer import abstract_params, count_parameters
from flmjax.workdir.metrics import METRICS_FILE, Record, read_metrics
from flmjax.workdir.paths import read_config


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
class RunRecord:
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
            # Growth that learns is growth's time.
            tuning_steps = next(s.tuning_steps for s in self.config.schedule if s.name == stage.config.name)
            tokens -= tuning_steps * stage.config.batch_size * stage.model.max_length
            total += tokens * sum(paces) / max(len(paces), 1)
        return total

    @property
    def flops_without_growth(self) -> float | None:
        """FLOPs had the newest stage's model seen all the tokens; None if nothing grew or the vocabulary is unknown."""
        model = self.stages[-1].model
        if len(self.stages) < 2 or model.vocab_size is None:
            return None
        return self.last["tokens"] * flops_per_token(model, model.max_length)


def read_run(workdir: Path) -> RunRecord:
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
    return RunRecord(
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
