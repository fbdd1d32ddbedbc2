"""A run read back from its workdir."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flmjax.config import ConfigError, RunConfig, Stage, to_json
from flmjax.data.loader import TrainingStream
from flmjax.data.prepared import Prepared, data_warnings, read_meta
from flmjax.data.tokenizers import load_tokenizer
from flmjax.model.flops import flops_per_token
from flmjax.model.transformer import abstract_params, count_parameters
from flmjax.optimizer.schedule import borders, learning_rate
from flmjax.report.goodput import goodput
from flmjax.report.stored_files import checked_lines, read_certificates, read_description
from flmjax.training.continuation import shifted
from flmjax.workdir.local_copy import reading_copy
from flmjax.workdir.metrics import METRICS_FILE, Record, read_metrics
from flmjax.workdir.paths import Parent, data_directory, read_config, read_parent
from flmjax.workdir.roll_backs import RollBack, read_roll_backs, rolled_back_samples
from flmjax.workdir.starts import read_starts
from flmjax.workdir.storage import run_path

CURVE_POINTS = 250  # of a schedule of learning rates


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A stage that has begun, and its lines of metrics.jsonl.

    Attributes:
        stage: of the schedule.
        parameters: of its model, padding of the vocabulary included; None: the vocabulary size is unknown.
        before: the line at the stage's start: step, tokens and FLOPs so far.
        last: the line at its end, or the newest.
        validation: the last line of that kind; without one it has no loss.
    """

    stage: Stage
    parameters: int | None
    before: Record
    last: Record
    validation: Record


class Mixture(NamedTuple):
    """The sources of a run's training data.

    Attributes:
        tokens: training tokens of each source, by its name.
        shares: for each stage of the schedule, the share of its samples that each source gives.
        epochs: samples that each source has given so far by samples that it has; None without the token files.
    """

    tokens: dict[str, int]
    shares: list[list[float]]
    epochs: list[float] | None


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run read back from its workdir.

    Attributes:
        config: with the vocabulary size of the prepared data, if that is there.
        config_json: as stored.
        train, validation, growth, sample: the lines of metrics.jsonl of each kind.
        certificates: of every growth so far.
        roll_backs: in order of time.
        gzip: bits per byte of the held-out text under gzip -9; None: unknown.
        mixture: sources of the training data; None: unknown.
        parent: the run that this one was grown from; None: not grown, or by an older version.
        parent_run: the parent read back up to the growth; None: no parent, or its workdir is gone.
        starts: entries of starts.jsonl; of an older version there are none.
        data_warnings: what a reader must know of the data (data/prepared.py).
        last: the line with the most steps.
        stages: those that have begun.
    """

    config: RunConfig
    config_json: Record
    train: list[Record]
    validation: list[Record]
    growth: list[Record]
    sample: list[Record]
    certificates: list[Record]
    roll_backs: list[RollBack]
    gzip: float | None
    mixture: "Mixture | None"
    parent: Parent | None
    parent_run: "RunRecord | None"
    starts: list[Record]
    data_warnings: list[str]
    last: Record
    stages: list[StageRecord]

    @property
    def training_seconds(self) -> float:
        """Seconds of the updates; those that tune a growth count as its time.

        Each stage takes its tokens times the mean of 1 / (tokens per second) over its lines that have a speed.
        """
        total = 0.0
        for record in self.stages:
            stage = record.stage
            lines = [line for line in self.train if line["stage"] == stage.name]
            paces = [1 / line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
            tokens = record.last["tokens"] - record.before["tokens"]
            tokens -= stage.tuning_steps * stage.config.batch_size * stage.model.max_length
            total += tokens * sum(paces) / max(len(paces), 1)
        return total

    @property
    def flops_without_growth(self) -> float | None:
        """FLOPs of the newest stage's model on all tokens; None without growth or a known vocabulary size."""
        model = self.stages[-1].stage.model
        if len(self.stages) < 2 or model.vocab_size is None:
            return None
        return self.last["tokens"] * flops_per_token(model, model.max_length)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of all starts by kind of work, as in report/goodput.py."""
        return goodput(self.starts)

    def tokens_after(self, step: int) -> int:
        """Tokens of the first `step` updates of the schedule, those of a learned growth included."""
        return self.config.stage_at(step).tokens_before(step)

    @functools.cached_property
    def learning_rates(self) -> tuple[list[int], list[float]]:
        """(tokens, learning rate) after updates of the schedule, also after those that are not trained yet.

        Every update of a short schedule; of a long one CURVE_POINTS, and both sides of the borders of stages and
        warm-ups, so that no corner is cut.
        """
        stages, last = self.config.stages, self.config.total_steps - 1
        updates = {int(update) for update in np.linspace(0, last, min(last + 1, CURVE_POINTS))}
        for border in borders(stages):
            updates |= {border - 1, border, border + 1}
        steps = sorted(updates & set(range(last + 1)))
        return [self.tokens_after(step + 1) for step in steps], [learning_rate(stages, step) for step in steps]


def read_run(workdir: Path, with_parent: bool = True) -> RunRecord:
    """Read a workdir, also of a run in progress; what is missing is None or empty.

    Args:
        with_parent: whether the workdir of the run's parent is read too.

    Raises:
        ConfigError: naming config.json or metrics.jsonl if it is absent or empty, and the file and its entry if one of
            the run's files is damaged.
    """
    with reading_copy(workdir) as folder:
        return _read_folder(folder, with_parent)


def _read_folder(workdir: Path, with_parent: bool) -> RunRecord:
    config = read_config(workdir)
    stored_config = to_json(config)
    folder = data_directory(config, workdir)
    meta = read_description(folder)
    if config.model.vocab_size is None and "tokenizer" in meta:
        model = dataclasses.replace(config.model, vocab_size=meta["tokenizer"]["vocab_size"])
        config = dataclasses.replace(config, model=model)
    records = checked_lines(read_metrics(workdir), workdir / METRICS_FILE)
    timed = [record for record in records if record["kind"] in ("train", "validation", "growth")]
    if not timed:
        raise ConfigError(f"{workdir / METRICS_FILE} is absent or empty; the run has not logged anything yet")
    stages = _stage_records(config, timed)
    if not stages:
        raise ConfigError(f"{workdir / METRICS_FILE} names no stage of {workdir / 'config.json'}")
    parent = read_parent(workdir)
    return RunRecord(
        config=config,
        config_json=stored_config,
        **{k: [r for r in records if r["kind"] == k] for k in ("train", "validation", "growth", "sample")},
        certificates=read_certificates(workdir),
        roll_backs=read_roll_backs(workdir),
        gzip=meta.get("validation_gzip_bits_per_byte"),
        mixture=_read_mixture(config, workdir, latest(timed)["step"], parent.first_sample if parent else 0),
        parent=parent,
        parent_run=_read_parent_run(parent) if parent and with_parent else None,
        starts=read_starts(workdir),
        data_warnings=data_warnings(meta.get("sources", {}), config.model.max_length),
        last=latest(timed),
        stages=stages,
    )


def _read_parent_run(parent: Parent) -> RunRecord | None:
    """The parent's lines up to the growth; None if its workdir is gone, or holds a run that has not come so far."""
    try:
        run = read_run(run_path(parent.workdir, "workdir"), with_parent=False)
    except (ConfigError, OSError):
        return None
    if run.last["step"] < parent.step:
        return None
    train, validation = (
        [line for line in lines if line["step"] <= parent.step] for lines in (run.train, run.validation)
    )
    return dataclasses.replace(run, train=train, validation=validation)


def _read_mixture(config: RunConfig, workdir: Path, step: int, first_sample: int) -> Mixture | None:
    """The mixture of the run's data, which are neither prepared nor verified; None without their description.

    Args:
        step: updates of the run so far.
        first_sample: of the run in the training stream; the parent of a grown run has read those before it.
    """
    try:
        folder = data_directory(config, workdir)
        prepared = Prepared(folder, read_meta(folder), load_tokenizer(folder))
        stream = shifted(TrainingStream.of_run(config, prepared, rolled_back_samples(workdir)), first_sample)
    except ConfigError:
        return None
    samples, shares = first_sample, []
    for stage in config.schedule:
        end = stream.samples_passed(first_sample + stage.samples_before(stage.end))
        counts = stream.source_samples(samples, end)
        shares.append([count / sum(counts) for count in counts])
        samples = end
    try:
        epochs = stream.epochs(stream.samples_passed(first_sample + config.stage_at(step).samples_before(step)))
    except OSError:  # the token files are gone
        epochs = None
    return Mixture({source: prepared.num_tokens(source, "train") for source in prepared.sources}, shares, epochs)


def _stage_records(config: RunConfig, lines: list[Record]) -> list[StageRecord]:
    """One entry for each stage with a line of metrics; a line at a boundary ends one stage and begins the next."""
    records = []
    for stage in config.schedule:
        of_stage = [line for line in lines if line["stage"] == stage.name]
        if not of_stage:
            continue
        has_vocabulary = stage.model.vocab_size is not None
        record = StageRecord(
            stage=stage,
            parameters=count_parameters(abstract_params(stage.model)[0]) if has_vocabulary else None,
            before=latest(lines, stage.start),
            last=latest(lines, stage.end),
            validation=latest([line for line in of_stage if line["kind"] == "validation"]),
        )
        records.append(record)
    return records


def latest(lines: list[Record], step: float = math.inf) -> Record:
    """The last line at or before `step`; a line of step 0 if there is none."""
    before = [line for line in lines if line["step"] <= step]
    return max(before, key=lambda line: line["step"], default={"step": 0, "tokens": 0, "flops": 0.0})
