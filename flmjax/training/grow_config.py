"""Settings of a run that grows from another run: what its user does not state is the source's. No JAX is imported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flmjax.config import (
    DERIVED,
    STAGE_SIZES,
    ConfigError,
    DataConfig,
    GrowthConfig,
    RunConfig,
    ScheduleSettings,
    StageConfig,
    resize,
)
from flmjax.config.validate import validate
from flmjax.data.prepare import has_same_preparation
from flmjax.data.prepared import META_FILE, read_meta
from flmjax.data.tokenizers import MODEL_FILE, SETTINGS_FILE, ByteTokenizer
from flmjax.workdir.paths import checkpoint_directory, data_directory, latest_whole_step, read_config

STAGE_NAME = "grown"


def source_config(source: Path) -> RunConfig:
    """The config of a new run that grows from the run in `source`, before its sizes are stated.

    It has the model, the data, the optimizer and the seed of the source, and one stage with the steps, the batch size
    and the schedule of the source's newest stage.

    Raises:
        ConfigError: if `source` is not the workdir of a run with a checkpoint.
    """
    step = latest_whole_step(checkpoint_directory(source))
    if step is None:
        raise ConfigError(f"--source={source} is no workdir of a run: it has no complete checkpoint")
    config = read_config(source)
    stage = config.stage_at(step)
    model = dataclasses.replace(
        stage.model, vocab_multiple=config.model.vocab_multiple, vocab_size=config.model.vocab_size
    )
    return dataclasses.replace(
        config, model=model, stages=(_first_stage(config, stage.index),), data=_source_data(config, source)
    )


def _first_stage(config: RunConfig, index: int) -> StageConfig:
    """Stage number `index` of the source as the first stage of a run, without sizes and growth settings."""
    begun = config.stages[: index + 1]
    starts = [stage for i, stage in enumerate(begun) if stage.starts_schedule(i)]
    schedule: dict[str, Any] = {name: getattr(starts[-1], name) for name in ScheduleSettings._fields}
    if schedule["warmup_steps"] is not None:
        schedule["warmup_steps"] = min(schedule["warmup_steps"], begun[-1].steps - 1)
    mixtures = [stage.mixture_weights for stage in begun if stage.mixture_weights is not None]
    sizes: dict[str, Any] = dict.fromkeys(STAGE_SIZES)
    mixture = mixtures[-1] if mixtures else None
    return dataclasses.replace(
        begun[-1], name=STAGE_NAME, growth=GrowthConfig(), mixture_weights=mixture, **schedule, **sizes
    )


def _source_data(config: RunConfig, source: Path) -> DataConfig:
    """The source's data: its token files if they are all there, else its vocabulary for the same texts."""
    directory = data_directory(config, source).absolute()
    if (directory / META_FILE).exists() and all((directory / name).is_file() for name in read_meta(directory)["files"]):
        return dataclasses.replace(config.data, directory=str(directory))
    return _with_vocabulary_of(directory, dataclasses.replace(config.data, directory=None))


def _with_vocabulary_of(directory: Path, data: DataConfig) -> DataConfig:
    settings = vocabulary_settings(directory)
    return data if settings is None else dataclasses.replace(data, **settings)


def vocabulary_settings(directory: Path) -> dict[str, Any] | None:
    """Settings of data that take the vocabulary of the prepared data in `directory`; None if no setting does.

    Raises:
        ConfigError: for a tokenizer's file that cannot be read.
    """
    path = directory / SETTINGS_FILE
    if not path.is_file():
        return {"vocabulary": str(directory / MODEL_FILE), "end_id": None}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored.pop("vocabulary")
        is_plain = kind == "bytes" and ByteTokenizer(**stored).fingerprint == ByteTokenizer().fingerprint
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no tokenizer's: {error!r}") from error
    if kind == "bytes":
        return {"vocabulary": "bytes", "end_id": None} if is_plain else None
    vocabulary = str(directory / MODEL_FILE) if kind == "sentencepiece" else kind
    return {"vocabulary": vocabulary, "end_id": stored.get("end_id")}


def grown_config(config: RunConfig, base: RunConfig) -> RunConfig:
    """`config`, in which flags have changed `base`, with the settings of the model that follow from the sizes.

    Other texts are prepared anew with the source's vocabulary.

    Args:
        base: source_config of the source.

    Raises:
        ConfigError: for a setting that breaks a rule.
    """
    validate(config)
    sizes = {name: getattr(config.schedule[0].model, name) for name in (*STAGE_SIZES, "max_length")}
    derived = resize(base.model, config.stages[0].growth.family, **sizes)
    follows = [name for name in DERIVED if getattr(config.model, name) == getattr(base.model, name)]
    model = dataclasses.replace(config.model, **{name: getattr(derived, name) for name in follows})
    data = config.data
    is_source_folder = data.directory is not None and data.directory == base.data.directory
    if is_source_folder and not has_same_preparation(data, base.data):
        directory, data = Path(str(data.directory)), dataclasses.replace(data, directory=None)
        if (data.vocabulary, data.end_id) == (base.data.vocabulary, base.data.end_id):
            data = _with_vocabulary_of(directory, data)
    return dataclasses.replace(config, model=model, data=data)
