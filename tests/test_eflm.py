"""The small eFLM learns to judge: text and a teacher in every batch, accuracy on held-out propositions."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quick_xla import QUICK_XLA

from flmjax.workdir.metrics import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"


def run_command(command: str, *flags: str, options: str = QUICK_XLA) -> str:
    """What `flmjax COMMAND FLAGS` prints, with XLA_FLAGS=`options`."""
    environment = os.environ | {"XLA_FLAGS": options}
    line = [sys.executable, "-m", "flmjax", command, *flags]
    process = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=1100)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_the_twin_of_eflm_continues_the_twin_of_16b(tmp_path):
    """Teachers join a run that had text alone: growth to equal sizes, with the vocabulary of the source."""
    source, target = f"{tmp_path}/flm", f"--workdir={tmp_path}/eflm"
    few = ("--config.stages[0].steps=30", "--config.stages[0].warmup_steps=5", "--config.sample_tokens=0")
    run_command("train", f"--config={CONFIGS}/flm_101b.py:cpu,16b", f"--workdir={source}", *few)
    config = f"--config={CONFIGS}/eflm_16b.py:cpu"
    assert "(exact)" in run_command("grow", config, f"--source={source}", target, *few)
    run_command("train", config, target, *few, "--config.log_every=1")
    before, after = (
        [line for line in read_metrics(tmp_path / name) if line["kind"] == "validation"] for name in ("flm", "eflm")
    )
    assert after[-1]["judged"] > 50
    first = next(line for line in read_metrics(tmp_path / "eflm") if line["kind"] == "train")
    # No start from random weights, whose loss is ln 257; one of its texts is not the source's.
    assert before[-1]["loss"] < first["language_loss"] < math.log(257) - 1


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_judgements_of_held_out_propositions_rise_well_above_chance(tmp_path):
    config = f"--config={CONFIGS}/eflm_16b.py:scratch"
    run_command("train", config, f"--workdir={tmp_path}/run", options="")  # of many updates, compiled to run fast
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "validation"]
    accuracy = [line["judgement_accuracy"] for line in lines]
    print([f"{value:.3f}" for value in accuracy])
    assert accuracy[0] < 0.6
    assert accuracy[-1] > 0.68  # 396 judgements: chance is 0.5 +- 0.025
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert lines[-1]["judged"] > 300
