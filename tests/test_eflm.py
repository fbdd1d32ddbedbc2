"""The small eFLM learns to judge: text and a teacher in every batch, accuracy on held-out propositions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flmjax.workdir.metrics import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "eflm_16b.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_judgements_of_held_out_propositions_rise_well_above_chance(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "flmjax", "train", f"--config={CONFIG}:cpu", f"--workdir={tmp_path}/run"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1100)
    assert process.returncode == 0, process.stderr[-2000:]
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "validation"]
    accuracy = [line["judgement_accuracy"] for line in lines]
    print([f"{value:.3f}" for value in accuracy])
    assert accuracy[0] < 0.6
    assert accuracy[-1] > 0.68  # 396 judgements: chance is 0.5 +- 0.025
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert lines[-1]["judged"] > 300
