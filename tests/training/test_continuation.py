"""Changes of a config that a run with a checkpoint permits, the samples that it has read, and incomplete metadata."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from flmjax.config import (
    ConfigError,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    to_stored,
)
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.training.continuation import (
    check_continuation,
    continued_stream,
    is_same_past,
    shifted,
)
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.position import Position, newest_position


def run(*stages: StageConfig, **fields) -> RunConfig:
    return RunConfig(model=ModelConfig(max_length=8), stages=stages, **fields)


def stage(name: str = "a", steps: int = 100, **fields) -> StageConfig:
    return StageConfig(**{"name": name, "steps": steps, "schedule": "constant", **fields})


def grown(name: str = "b", steps: int = 100, policy: str = "continue", **growth) -> StageConfig:
    return StageConfig(name=name, steps=steps, embed_dim=160, growth=GrowthConfig(rate_policy=policy, **growth))


def position(config: RunConfig, step: int, index: int = 0, fingerprint: str = "") -> Position:
    """Where a run of `config` stands after `step` updates, the last of them in stage number `index`."""
    with_vocabulary = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    at = with_vocabulary.schedule[index]
    return Position(step, at, with_vocabulary, at.samples_before(step), fingerprint, {})


WSD = stage(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
COSINE = stage(schedule="cosine", warmup_steps=10)


@pytest.mark.parametrize(
    ("past", "step", "index", "config"),
    [
        (run(stage()), 100, 0, run(stage(steps=200))),
        (run(stage()), 60, 0, run(stage(steps=60))),
        (run(stage()), 100, 0, run(stage(), grown())),
        (run(stage()), 100, 0, run(stage(schedule="wsd", steps=200, decay_fraction=0.5))),
        (run(stage()), 50, 0, run(stage(), mesh=RunConfig().mesh, log_every=3)),
        (run(WSD), 80, 0, run(dataclasses.replace(WSD, steps=300))),
        (run(COSINE), 10, 0, run(dataclasses.replace(COSINE, steps=300))),
        (run(COSINE), 100, 0, run(COSINE, grown(policy="stage"))),
        (run(WSD), 100, 0, run(WSD, grown(policy="stage"), grown("c", policy="rewarm"))),
        (run(stage(), grown()), 150, 1, run(stage(), grown(steps=140), grown("c"))),
        (run(stage(), grown()), 100, 0, run(stage(steps=120), grown(ramp_steps=5, family="mask"))),
        (run(stage(), grown()), 200, 1, run(stage(), grown(steps=1000, new_warmup_fraction=0.001))),
    ],
)
def test_a_run_goes_on_where_no_update_would_have_differed(past, step, index, config, tmp_path):
    """AI-Hypercomputer/maxtext#2882: a run that had ended could not take more steps."""
    check_continuation(tmp_path, position(past, step, index), config)


@pytest.mark.parametrize(
    ("past", "step", "index", "config", "words"),
    [
        (
            run(COSINE),
            50,
            0,
            run(dataclasses.replace(COSINE, steps=200)),
            r"stages\[0\].steps: 100 -> 200 would change",
        ),
        (run(COSINE), 12, 0, run(COSINE, grown()), r"stages: 1 -> 2 would change the learning rate"),
        (run(COSINE), 100, 0, run(COSINE, grown(policy="rewarm")), "rate_policy='stage'"),
        (run(COSINE), 100, 0, run(COSINE, grown(policy="rewind")), "rate_policy='stage'"),
        (
            run(WSD),
            90,
            0,
            run(dataclasses.replace(WSD, steps=300)),
            r"update \d+: 0.\d+ -> 0.\d+.*wsd before its decay",
        ),
        (
            run(stage()),
            1,
            0,
            run(stage(learning_rate=2e-3)),
            r"learning_rate: 0.001 -> 0.002 .*update 1: 0.001 -> 0.002\); take another --workdir for them$",
        ),
        (run(stage()), 50, 0, run(stage(warmup_steps=20)), "warmup_steps: 0 -> 20 would change"),
        (
            run(stage(schedule="wsd", decay_fraction=0.01, steps=1000), grown(steps=2000, policy="stage")),
            2000,
            1,
            run(stage(schedule="wsd", decay_fraction=0.005, steps=1000), grown(steps=2000, policy="stage")),
            r"decay_fraction: 0.01 -> 0.005 would change .*update 99\d",
        ),
        (run(stage()), 50, 0, run(stage(steps=49)), r"stages\[0\].steps: 100 -> 49;"),
        (run(stage()), 50, 0, run(stage(batch_size=16)), r"stages\[0\].batch_size: 8 -> 16;"),
        (run(stage()), 50, 0, run(stage(embed_dim=256)), r"stages\[0\].embed_dim: None -> 256;"),
        (run(stage()), 50, 0, run(stage(), seed=1), "seed: 0 -> 1;"),
        (
            run(stage()),
            50,
            0,
            run(stage(), data=DataConfig(sources=("x" * 5000,))),
            r"data.sources: \('python_docs',\) -> \('x",
        ),
        (run(stage(), grown()), 150, 1, run(stage(steps=120), grown()), r"stages\[0\].steps: 100 -> 120;"),
        (run(stage(), grown()), 150, 1, run(stage()), r"stages: 2 -> 1, but stages\[1\] has begun"),
        (run(stage(), grown()), 150, 1, run(stage(), grown(moments="reset")), "growth.moments: carry -> reset"),
    ],
)
def test_a_change_of_the_past_is_refused_in_one_short_line(past, step, index, config, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as refusal:
        check_continuation(tmp_path, position(past, step, index), config)
    assert len(str(refusal.value)) < 600 + len(str(tmp_path))


def test_another_spelling_of_a_path_is_the_same_config(tmp_path):
    """A run of `text` was refused with `text/`."""
    names = [("text", "topic:text", "v.model"), ("./text/", "topic:text//", "./v.model")]
    past, config = (
        run(stage(), data=DataConfig(sources=(text,), teachers=(teacher,), vocabulary=vocabulary))
        for text, teacher, vocabulary in names
    )
    check_continuation(tmp_path, position(past, 50), config)


def test_a_run_without_a_checkpoint_takes_every_config(tmp_path):
    check_continuation(tmp_path, None, run(stage(learning_rate=2e-3)))


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources of bytes."""
    texts = {name: [f"{name} text number {i}" for i in range(100)] for name in ("a", "b")}
    settings = DataConfig(sources=("a", "b"), vocabulary="bytes", validation_fraction=0.2)
    return prepare(settings, tmp_path_factory.mktemp("data") / "data", sources=texts)


def mixed(*weights: tuple[float, float] | None, steps: int = 10) -> RunConfig:
    """A run with a stage of `steps` steps for each mixture."""
    stages = [stage(f"s{i}", steps, mixture_weights=pair) for i, pair in enumerate(weights)]
    return run(*stages, data=DataConfig(sources=("a", "b"), vocabulary="bytes", validation_fraction=0.2))


def test_a_later_mixture_may_change_and_an_earlier_one_not(data, tmp_path):
    past, later = mixed((1.0, 1.0), (1.0, 3.0)), mixed((1.0, 1.0), (3.0, 1.0), steps=12)
    stream, other = (TrainingStream.of_run(config, data) for config in (past, later))
    at = position(past, 10, 0, stream.fingerprint)
    assert continued_stream(tmp_path, at, other).fingerprint == other.fingerprint
    beyond = position(past, 11, 1, stream.fingerprint)
    with pytest.raises(ConfigError, match="the data or its mixture is not that of the checkpoint at step 11"):
        continued_stream(tmp_path, beyond, other)


def test_a_run_grown_from_another_goes_on_in_its_stream(data):
    """The samples that the source read come first; the new run's mixtures follow after them."""
    source = TrainingStream.of_run(mixed((1.0, 1.0)), data)
    new = shifted(TrainingStream.of_run(mixed((1.0, 1.0), (1.0, 3.0)), data), 64)
    assert is_same_past(source, new, 64)
    assert new.schedule[0].samples == 64 + 10 * 8
    assert not is_same_past(source, shifted(TrainingStream.of_run(mixed((2.0, 1.0)), data), 64), 64)


# ---- metadata --------------------------------------------------------------------------------------------------------

META = {**to_stored(run(stage())), "stage": 0, "samples_seen": 24, "fingerprint": "f"}


def saved(folder, meta):
    """A workdir with a checkpoint of one number and this metadata."""
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, {"params": {"x": jnp.zeros(1)}, "train_state": {"y": jnp.zeros(1)}}, meta)
        checkpoints.wait()
    return folder


def test_the_position_is_read_from_the_newest_checkpoint(tmp_path):
    assert newest_position(tmp_path) is None
    at = newest_position(saved(tmp_path, META))
    assert (at.step, at.stage.index, at.samples_seen, at.fingerprint) == (3, 0, 24, "f")
    assert at.config == run(stage())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage": None}, "has no 'stage'"),
        ({"stage": "a"}, "has stage='a'"),
        ({"stage": 1}, "has stage 1, but its config has 1 stages"),
        ({"fingerprint": None}, "has no 'fingerprint'"),
        ({"config": None}, "has no 'config'"),
        ({"config": [1]}, "has no 'config'"),
        ({"config": {"modle": {}}}, "config has no field 'modle'"),
    ],
)
def test_incomplete_metadata_is_named_in_one_line(change, words, tmp_path):
    meta = {key: value for key, value in {**META, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words) as refusal:
        newest_position(saved(tmp_path, meta))
    assert str(tmp_path / "checkpoints" / "3") in str(refusal.value)


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_the_newest(tmp_path, monkeypatch):
    """A run in training deletes its old checkpoints."""
    workdir = saved(tmp_path, META)
    steps = iter([9, 3])
    monkeypatch.setattr("flmjax.workdir.position.latest_whole_step", lambda _: next(steps))
    assert newest_position(workdir).step == 3


def test_a_stored_config_without_a_field_has_its_default(tmp_path):
    """lab-cosmo/upet#146: a checkpoint of an older version, which lacks a field, was refused."""
    del (config := to_stored(run(stage()))["config"])["optimizer"]["max_skipped_updates"], config["data"]["workers"]
    at = newest_position(saved(tmp_path, {**META, "config": config}))
    check_continuation(tmp_path, at, run(stage()))


def test_a_longer_stage_keeps_the_warmup_of_the_parameters_that_it_created(tmp_path):
    """The warm-up is a share of the stage's steps: a longer stage would have slowed updates that are made already."""
    past, longer = run(stage(), grown(new_warmup_fraction=0.5)), run(stage(), grown(steps=300, new_warmup_fraction=0.5))
    with pytest.raises(ConfigError, match=r"stages\[1\] created have a warm-up of 50 updates, and of 150") as refusal:
        check_continuation(tmp_path, position(past, 150, 1), longer)
    cure = float(re.search(r"new_warmup_fraction=(\S+) keeps it", str(refusal.value))[1])
    check_continuation(tmp_path, position(past, 150, 1), run(stage(), grown(steps=300, new_warmup_fraction=cure)))
    check_continuation(tmp_path, position(past, 80, 0), longer)  # the stage has not begun


def test_a_stage_that_created_no_parameters_may_become_longer(tmp_path):
    same = {"name": "b", "growth": GrowthConfig(new_warmup_fraction=0.5)}
    past = run(stage(), stage(**same))
    check_continuation(tmp_path, position(past, 150, 1), run(stage(), stage(steps=300, **same)))
