"""The start of a run that cannot be: one line, and nothing is left that refuses the corrected command."""

import dataclasses
import sys
from pathlib import Path

import pytest

from flmjax import cli
from flmjax.config import ConfigError, ModelConfig, RunConfig, StageConfig
from flmjax.model.attention import check_backends

QUICKSTART = f"--config={Path(__file__).parents[1] / 'configs' / 'quickstart.py'}"
TEXT = "a sentence of the text that is long enough. " * 40


@pytest.fixture
def text(tmp_path):
    """A folder with five short documents."""
    (tmp_path / "text").mkdir()
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} {TEXT}")
    return tmp_path / "text"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.data.sources=nowhere"], "nowhere"),
        (["--config.data.vocabulary=nowhere.model"], "nowhere.model"),
        (["--config.data.vocabulary=cl100k"], "needs a package; pip install"),
        (["--config.model.attention=cudnn"], "model.attention='cudnn' needs an NVIDIA GPU"),
        (["--config.stages[0].batch_size=4096"], "fewer than one batch of 4096"),
        (["--config.data.validation_fraction=0.0001"], "none of the 5 documents of "),
        (["--config.data.task_module=nowhere"], "data.task_module='nowhere' is not read"),
    ],
)
@pytest.mark.parametrize("depth", ["run", "runs/deep/run"])
def test_a_start_that_is_refused_leaves_nothing(flags, words, depth, text, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "bpe_openai", None)  # not installed
    workdir = tmp_path / depth
    settings = [f"--config.data.sources={text}", "--config.data.vocabulary=bytes", "--config.model.max_length=64"]
    assert cli.main(["train", QUICKSTART, f"--workdir={workdir}", *settings, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_data_that_were_there_before_stay(text, capsys, tmp_path):
    """A refused start removes only the data that it prepared itself."""
    settings = [f"--config.data.sources={text}", "--config.data.vocabulary=bytes", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(["prepare", QUICKSTART, *settings]) == 0
    assert cli.main(["train", QUICKSTART, *settings, "--config.stages[0].batch_size=4096"]) == 2
    assert "fewer than one batch" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


def test_a_prompt_that_is_too_long_keeps_the_prepared_data(text, capsys, tmp_path):
    """Hours of preparation were removed; the corrected command has the same data."""
    settings = [f"--config.data.sources={text}", "--config.data.vocabulary=bytes", "--config.model.max_length=64"]
    settings += [f"--workdir={tmp_path / 'run'}", f"--config.sample_prompt={'a' * 64}"]
    assert cli.main(["train", QUICKSTART, *settings]) == 2
    assert "sample_prompt has 64 tokens" in capsys.readouterr().err
    assert (tmp_path / "run" / "data" / "meta.json").exists()
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "bfloat16"), ("tpu", "bfloat16"), ("gpu", "float32")])
def test_cudnn_is_refused_where_it_cannot_compute(platform, dtype):
    run = RunConfig(model=ModelConfig(attention="cudnn", dtype=dtype))
    check_backends(RunConfig(model=ModelConfig(attention="cudnn", dtype="bfloat16")), "gpu")
    check_backends(RunConfig(model=ModelConfig(attention="fused", dtype=dtype)), platform)
    with pytest.raises(ConfigError, match=r"^model.attention='cudnn'"):
        check_backends(run, platform)
    of_stage = dataclasses.replace(run, model=ModelConfig(dtype=dtype), stages=(StageConfig(attention="cudnn"),))
    with pytest.raises(ConfigError, match=r"^stages\[0\].attention='cudnn'"):
        check_backends(of_stage, platform)
