"""A trained model read from a workdir, and how light `import flmjax` is."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from run_cases import make_lab, start

import flmjax
from flmjax.config import ConfigError
from flmjax.data.loader import TrainingStream
from flmjax.data.prepared import load as load_data
from flmjax.model.transformer import forward
from flmjax.workdir.metrics import read_metrics


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two stages with a checkpoint at every fifth step; the mask of the second opens from 15 to 23."""
    lab = make_lab(tmp_path_factory.mktemp("lab"))
    start(lab, "never", lab / "all", "--config.checkpoint.keep=9")
    return lab / "all"


@pytest.mark.parametrize("step", [10, 20, 30, None])
def test_a_loaded_model_has_the_validation_loss_of_its_step(workdir, step):
    """At step 20 the model computes with masked parameters, so that the stored ones give another loss."""
    model = flmjax.load(workdir, step)
    assert model.step == (30 if step is None else step)
    assert model.config.num_layers == (1 if step == 10 else 2)
    assert model.tokenizer.vocab_size == model.config.vocab_size == 257
    (line,) = [x for x in read_metrics(workdir) if x["kind"] == "validation" and x["step"] == model.step]
    rows = TrainingStream.of_run(model.run, load_data(workdir / "data")).validation_set(8).rows
    logits_BLV = np.asarray(forward(model.params, model.config, rows["tokens"]), np.float64)[..., :257]
    log_p_BL = np.take_along_axis(logits_BLV, rows["targets"][..., None], -1)[..., 0]
    log_p_BL -= np.log(np.sum(np.exp(logits_BLV), axis=-1))
    assert -np.average(log_p_BL, weights=rows["weights"]) == pytest.approx(line["loss"], rel=1e-5)


def test_a_missing_step_is_named_with_those_that_are_there(workdir):
    with pytest.raises(ConfigError, match="has no checkpoint at step 7, only at 5, 10, 15, 16, 20, 25, 30"):
        flmjax.load(workdir, 7)


def test_a_folder_without_a_run_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=f"{re.escape(str(folder))} is no workdir of a run"):
            flmjax.load(str(folder))
    assert not (tmp_path / "absent").exists()


def test_a_run_without_its_tokenizer_is_named(workdir, tmp_path):
    for part in ("checkpoints", "config.json"):
        (tmp_path / part).symlink_to(workdir / part)
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path / 'data'))} holds no tokenizer"):
        flmjax.load(tmp_path)


def test_loading_writes_nothing(workdir):
    before = {path: path.stat().st_mtime_ns for path in sorted(workdir.rglob("*"))}
    jax.block_until_ready(flmjax.load(workdir).params)
    assert {path: path.stat().st_mtime_ns for path in sorted(workdir.rglob("*"))} == before


def test_import_flmjax_needs_no_jax_and_under_300_ms():
    """The least of five times: a busy machine makes single ones longer."""
    code = (
        "import sys, time; start = time.perf_counter(); import flmjax; seconds = time.perf_counter() - start; "
        "assert not {'jax', 'numpy'} & set(sys.modules); print(seconds)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60) for _ in range(5)]
    assert min(float(run.stdout) for run in runs) < 0.3
