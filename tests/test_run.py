"""Runs in subprocesses that are killed, resumed or starved of disk: each costs the last interval at most."""

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from run_cases import ALTERNATING, APART, assert_same_run, batches, make_lab, start

from flmjax.config import CheckpointConfig, MeshShape, RunConfig, from_config_dict
from flmjax.data.loader import TrainingStream
from flmjax.data.prepared import load
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.model.loss import loss_sums
from flmjax.sharding.mesh import make_mesh
from flmjax.text_table import printable
from flmjax.training import loop
from flmjax.training.loop import Run
from flmjax.training.state import state_spec
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.heartbeat import read_heartbeat
from flmjax.workdir.metrics import read_metrics
from flmjax.workdir.paths import read_config
from flmjax.workdir.starts import read_starts


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the run `straight`, which was not interrupted: run_cases.make_lab."""
    return make_lab(tmp_path_factory.mktemp("lab"))


def test_a_run_writes_its_files_and_metrics(lab):
    straight = lab / "straight"
    assert sorted(p.name for p in straight.iterdir() if not p.name.startswith(".")) == [
        "certificates", "checkpoints", "config.json", "data", "heartbeat.json", "loss.png", "metrics.jsonl",
        "report.html", "starts.jsonl", "tensorboard",
    ]  # fmt: skip
    certificate = json.loads((straight / "certificates" / "step_00000015.json").read_text())
    assert certificate["max_difference"]["float32"] <= 1e-4
    assert certificate["max_difference"]["float64"] <= 1e-10
    assert certificate["mask_removed"] <= 1e-10
    lines = read_metrics(straight)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 31))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 15, 20, 30]
    assert [line["stage"] for line in lines if line["kind"] == "sample"] == ["small", "large"]
    assert [line["tokens"] for line in lines if line["kind"] == "train"][-1] == 15 * 4 * 32 + 15 * 6 * 32
    assert len(batches(straight)) == 30
    assert len(set.union(*batches(straight).values())) == 30  # no batch came twice


def test_processes_save_by_the_clock_of_one(monkeypatch):
    """A process whose clock says otherwise would wait for the save of the others for ever."""
    checkpoint = CheckpointConfig(every=10**6, every_minutes=30)
    run = SimpleNamespace(config=RunConfig(checkpoint=checkpoint, log_every=10), saved_at=time.monotonic())
    run.are_minutes_over = lambda: Run.are_minutes_over(run)
    stage = RunConfig().schedule[0]

    def due(step, minutes_ago):
        run.saved_at = time.monotonic() - 60 * minutes_ago
        return Run.is_save_due(run, step, stage)

    assert [due(20, 31), due(21, 31), due(20, 29)] == [True, False, False]
    for answer in (True, False):
        monkeypatch.setattr(loop, "from_writer", lambda _, answer=answer: answer)
        assert due(20, 0) == due(20, 99) == answer


def test_kill_between_saves_loses_nothing(lab):
    """Weights must not come back while the data starts over: keras-team/keras#22490, NVIDIA/Megatron-LM#1343."""
    workdir = lab / "killed"
    start(lab, "batch:12", workdir, expect=-9)  # the first 11 steps are done, step 10 is saved
    # Step 10 was being written when the kill came: it is complete or absent.
    shown = start(lab, "never", workdir).stdout
    assert re.search(r"resume at step (5|10):", shown)
    assert not re.search(r"float32 (\S+) \(the run\), float32 \1", shown)  # a certificate's number once
    for stage, line in zip(("small 15", "large 30"), read_samples(workdir), strict=True):
        first_line = printable(line["prompt"] + line["text"]).partition("\n")[0]
        assert f"{stage}: text sample\n    {first_line}" in shown
    assert_same_run(lab / "straight", workdir)


def read_samples(workdir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(workdir) if line["kind"] == "sample"]


def test_every_start_has_its_origin_and_its_wall_time(lab):
    """The killed process has its entry of the last checkpoint, the interrupted one that of its end."""
    workdir = lab / "starts"
    start(lab, "saved:12", workdir, expect=-9)
    start(lab, "interrupt:14", workdir, expect=130)
    began = time.monotonic()
    shown = start(lab, "never", workdir).stdout
    wall = time.monotonic() - began
    entries = read_starts(workdir)
    assert [(entry["first_step"], entry["last_step"]) for entry in entries] == [(0, 10), (10, 13), (10, 30)]
    assert all(f"--workdir={workdir}" in entry["command"] for entry in entries)
    seconds = entries[2]["seconds"]
    assert 0.2 * wall < sum(seconds.values()) < wall
    names = ("restoring", "updates", "compilation", "evaluation", "checkpoints", "growth", "samples", "data loading")
    assert all(seconds[name] > 0 for name in names)
    assert re.search(r"^goodput \d+\.\d% of .* in new updates; .*repeated updates \d+\.\d%", shown, re.MULTILINE)
    beat = read_heartbeat(workdir)
    assert (beat["state"], beat["step"], beat["stage"]) == ("finished", 30, "large")


def test_kill_while_the_mask_opens_loses_nothing(lab):
    """Steps 15 to 22 are masked; the checkpoint of step 20 holds the weights under the mask, not the masked ones."""
    workdir = lab / "masked"
    start(lab, "saved:22", workdir, expect=-9)
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest_step() == 20
        check_masked_validation(workdir, checkpoints)
    shown = start(lab, "never", workdir).stdout
    assert "resume at step 20:" in shown
    assert "large 23: the growth mask is fully open; training continues without it" in shown
    assert_same_run(lab / "straight", workdir)


def check_masked_validation(workdir: Path, checkpoints: Checkpoints) -> None:
    """The loss reported at step 20 is that of the masked model, whose mask is open by 5 of 8 steps."""
    config = from_config_dict(checkpoints.meta(20)["config"])
    old, new = config.stage_models
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    params = checkpoints.restore(20, {"params": state_spec(new, config.optimizer, mesh).abstract.params})["params"]
    batch = TrainingStream.of_run(config, load(workdir / "data")).validation_rows(8)
    rows = {**batch, "bytes": np.ones(8, np.float32)}
    losses = [
        float(jax.jit(lambda p: loss_sums(p, rows, new)[0])(p)) / rows["weights"].sum()
        for p in (masked(params, Growth(old, new, config.stages[1].growth), 5 / 8), params)
    ]
    reported = [r["loss"] for r in read_metrics(workdir) if r["kind"] == "validation" and r["step"] == 20][-1]
    assert reported == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-4


def test_learned_growth_consumes_samples_of_the_stage(lab):
    """Three tuning batches before step 15: the stage's batches move on by three, tokens and FLOPs are counted."""
    workdir, growth = lab / "learned", "--config.stages[1].growth"
    flags = [f"{growth}.family=learned", f"{growth}.ramp_steps=0", f"{growth}.tuning_steps=3"]
    shown = start(lab, "never", workdir, *flags).stdout
    assert re.search(r"growth learned in 3 updates on 18 samples: loss [\d.]+ -> [\d.]+", shown)
    assert "not exact: tuned from an exact start" in shown
    straight, learned = batches(lab / "straight"), batches(workdir)
    assert [learned[step] for step in range(15)] == [straight[step] for step in range(15)]
    assert [learned[step] for step in (-1, -2, -3)] == [straight[step] for step in (15, 16, 17)]
    assert [learned[step] for step in range(15, 27)] == [straight[step + 3] for step in range(15, 27)]
    lines = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    assert lines[-1]["tokens"] == 15 * 4 * 32 + 18 * 6 * 32
    plain = [line for line in read_metrics(lab / "straight") if line["kind"] == "train"]
    assert lines[14]["flops"] == plain[14]["flops"]
    update = plain[-1]["flops"] - plain[-2]["flops"]
    assert lines[15]["flops"] - plain[15]["flops"] > 3 * update


def test_kill_inside_the_growth_point_loses_nothing(lab):
    workdir = lab / "killed_growing"
    start(lab, "growth", workdir, expect=-9)
    assert not (workdir / "certificates").exists()
    assert "resume at step 15" in start(lab, "never", workdir).stdout
    assert_same_run(lab / "straight", workdir)


def test_kill_while_saving_and_an_empty_folder_cost_one_interval(lab):
    """A half-written checkpoint must not pass for the newest: google/flax#1200, google/orbax#394."""
    workdir = lab / "killed_saving"
    start(lab, "saving:2", workdir, expect=-9)
    (workdir / "checkpoints" / "12").mkdir()  # Orbax alone would take it for the newest
    result = start(lab, "never", workdir)
    assert "resume at step 5" in result.stdout or "resume at step 10" in result.stdout
    assert f"removed {workdir / 'checkpoints' / '12'}: not a complete checkpoint" in result.stderr
    assert_same_run(lab / "straight", workdir)
    assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]


def test_full_disk_stops_the_run_and_spares_the_last_checkpoint(lab):
    """A background save that fails must not be ignored: google/orbax#605, keras-team/keras#23609."""
    workdir = lab / "full"
    result = start(lab, "full:2", workdir, "--config.checkpoint.keep=1", expect=1)
    assert "saving in" in result.stderr
    assert "_SignalingThread" not in result.stderr  # a traceback that Orbax logs
    assert len(result.stderr.strip().splitlines()[-1]) < 600
    assert len(batches(workdir)) <= 15  # within one interval of the second save, at step 10
    assert "resume at step 5" in start(lab, "never", workdir).stdout
    assert_same_run(lab / "straight", workdir)


def test_nan_gradients_stop_the_run_and_spare_the_last_checkpoint(lab):
    """Training must not go on without updates: pytorch/pytorch#46849, optax#1746."""
    workdir = lab / "nan"
    result = start(lab, "nan:8", workdir, "--config.optimizer.max_skipped_updates=3", expect=1)
    assert "step 10: update skipped, not finite: embedding" in result.stderr
    assert "(3 in a row); training stopped with the parameters of step 7" in result.stderr
    assert max(batches(workdir)) <= 11  # the next update had been started
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 5


def test_the_same_command_leaves_a_finished_run_as_it_is(lab):
    before = (lab / "straight" / "metrics.jsonl").read_text()
    shown = start(lab, "never", lab / "straight").stdout
    assert "finished at step 30, nothing left to do" in shown
    assert "report" in shown
    assert "compiling" not in shown
    assert (lab / "straight" / "metrics.jsonl").read_text() == before


def test_workdir_of_another_config_is_refused_with_the_fields(lab):
    result = start(lab, "never", lab / "straight", "--config.model.mlp_dim=64", "--config.stages[1].steps=20", expect=2)
    assert "model.mlp_dim: 48 -> 64; take another --workdir (only steps from 30 on and later" in result.stderr


MORE = """
import dataclasses, importlib.util
from flmjax.config import *

def get_config():
    spec = importlib.util.spec_from_file_location("first", r"CONFIG")
    first = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first)
    config = from_config_dict(first.get_config())
    mask = GrowthConfig("mask", ramp_steps=2, rate_policy="stage")
    further = StageConfig(name="larger", steps=3, batch_size=6, growth=mask, num_layers=3)
    return to_config_dict(dataclasses.replace(config, stages=(*config.stages, further)))
"""


def test_a_finished_run_takes_more_steps_and_a_further_stage(lab):
    """AI-Hypercomputer/maxtext#2882. The longer run is bitwise the one that was planned so from the start."""
    workdir = lab / "extended"
    start(lab, "never", workdir, "--config.stages[1].steps=12")
    assert "resume at step 27" in start(lab, "never", workdir).stdout
    for kind in ("train", "validation"):
        lines = [[line for line in read_metrics(w) if line["kind"] == kind] for w in (lab / "straight", workdir)]
        of_steps = [{line["step"]: line["loss"] for line in of_run} for of_run in lines]
        assert of_steps[0].items() <= of_steps[1].items()
    assert batches(workdir) == batches(lab / "straight")
    (lab / "more.py").write_text(MORE.replace("CONFIG", str(lab / "config.py")))
    start(lab, "never", workdir, config="more.py")
    trained = [line["step"] for line in read_metrics(workdir) if line["kind"] == "train"]
    assert trained == list(range(1, 34))
    assert [line["step"] for line in read_metrics(workdir) if line["kind"] == "growth"] == [15, 30]
    assert len(read_config(workdir).stages) == 3
    assert "holds a run of another config: stages: 3 -> 2" in start(lab, "never", workdir, expect=2).stderr


def test_an_interrupt_says_the_steps_and_the_missing_sample_follows(lab):
    workdir = lab / "interrupted"
    result = start(lab, "interrupt:8", workdir, expect=130)
    assert "flmjax: interrupted: stopped at step 7; step 5 is on disk; run the same command again" in result.stderr
    result = start(lab, "sampling", workdir, expect=130)
    assert "stopped at step 15; step 15 is on disk" in result.stderr
    start(lab, "never", workdir)
    assert_same_run(lab / "straight", workdir)


def test_a_start_says_what_it_does_and_no_number_twice(lab):
    shown = start(lab, "batch:2", lab / "said", expect=-9).stdout.splitlines()
    assert shown[:2] == ["loading", "preparing the data"]
    assert "compiling stage small" in shown
    assert not any("6 FLOPs" in line or "convention" in line for line in shown)


def test_another_tensor_size_pads_the_vocabulary_anew(lab):
    """257 rows of the table on one device are 258 on two, in parameters, moments and births."""
    flags = ["--config.model.vocab_multiple=1", "--config.stages[0].steps=8", "--config.stages[1].steps=8"]
    flags += ["--config.sample_tokens=0", "--config.checkpoint.keep=9"]
    one, two = lab / "tensor1", lab / "tensor2"
    start(lab, "never", one, *flags)
    shutil.copytree(one, two)
    for step in (two / "checkpoints").glob("1[1-9]"):
        shutil.rmtree(step)
    shown = start(lab, "never", two, *flags, "--config.mesh.fsdp=1", "--config.mesh.tensor=2", devices=2).stdout
    assert "resume at step 10" in shown
    losses = [[line["loss"] for line in read_metrics(w) if line["kind"] == "train"] for w in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    back = two / "checkpoints" / "16"
    shutil.rmtree(back)
    assert "resume at step 15" in start(lab, "never", two, *flags).stdout


def test_settings_of_execution_may_change(lab):
    flags = ("--config.stages[1].microbatches=3", "--config.log_every=5", "--config.model.remat=full")
    start(lab, "never", lab / "straight", *flags)


def test_learning_rate_and_seed_compile_nothing_anew(lab):
    """The same program keeps its key in the compile cache: jax-ml/jax#13325, jax-ml/jax#18819."""
    flags = ("--config.seed=5", "--config.stages[0].learning_rate=1e-3")
    cached = {p.name for p in (lab / "cache").iterdir()}
    start(lab, "never", lab / "reseeded", *flags)
    new = {p.name for p in (lab / "cache").iterdir()} - cached
    assert not [name for name in new if "train_step" in name or "grow" in name], new


def test_log_of_a_run_is_plain_lines(lab):
    result = start(lab, "batch:3", lab / "log", expect=-9)
    assert "\r" not in result.stdout + result.stderr
    assert "\x1b" not in result.stdout + result.stderr


def test_a_prompt_as_long_as_a_sequence_is_refused_before_training(lab):
    """google-deepmind/gemma#488."""
    result = start(lab, "never", lab / "prompt", f"--config.sample_prompt={'a' * 32}", expect=2)
    assert "sample_prompt has 32 tokens" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list((lab / "prompt" / "checkpoints").glob("[0-9]*"))


def test_two_sources_and_two_teachers_are_validated_apart(lab):
    """NVIDIA-NeMo/Megatron-Bridge#618: metrics, terminal and report; the second source joins in the second stage."""
    for name, letter in (("en", "e"), ("zh", "z")):
        text = "\n\n\n".join(f"{letter * (40 + i % 50)} {i}" for i in range(400))
        (lab / f"{name}.txt").write_text(text)
        rows = [json.dumps({"proposition": f"{i} {letter}", "judgement": i % 2 == 0}) for i in range(300)]
        (lab / f"{name}_judged.jsonl").write_text("\n".join(rows))
    (lab / "apart.py").write_text(APART.replace("LAB", str(lab)))
    shown = start(lab, "never", lab / "apart", config="apart.py").stdout
    lines = [line for line in read_metrics(lab / "apart") if line["kind"] == "validation"]
    assert len(lines) == 2
    for line in lines:
        for label in ("en.txt", "zh.txt"):
            loss, bits = line[f"loss/{label}"], line[f"bits_per_byte/{label}"]
            assert bits == pytest.approx(loss / np.log(2), rel=0.05)  # a byte each, and the end tokens
            assert f"{label} {bits:.4f}" in shown
        for label in ("en_judged.jsonl", "zh_judged.jsonl"):
            assert f"{label} {100 * line[f'judgement_accuracy/{label}']:.1f} %" in shown
    first = lines[0]
    assert first["loss/zh.txt"] > first["loss/en.txt"] + 1  # its weight in the first stage is 0
    page = (lab / "apart" / "report.html").read_text()
    assert "Validation by source" in page
    assert "zh_judged.jsonl" in page


def test_a_resume_inside_a_window_of_lines_loses_no_metric(lab):
    """The line of step 8 has the teachers' batch of step 7, though the run was resumed after it."""
    write_alternating(lab)
    straight, resumed = lab / "window", lab / "window_resumed"
    flags = ("--config.log_every=4", "--config.checkpoint.every=7")
    start(lab, "never", straight, *flags, config="alternating.py")
    start(lab, "saved:8", resumed, *flags, config="alternating.py", expect=-9)
    assert "resume at step 7:" in start(lab, "never", resumed, *flags, config="alternating.py").stdout
    timeless = [
        [{k: v for k, v in line.items() if k not in ("tokens_per_second", "model_flops_utilization")} for line in lines]
        for lines in map(read_metrics, (straight, resumed))
    ]
    assert timeless[0] == timeless[1]
    assert None not in timeless[1][-1].values()


def write_alternating(lab):
    rows = [json.dumps({"proposition": f"{i} is a number", "judgement": i % 2 == 0}) for i in range(300)]
    (lab / "propositions.jsonl").write_text("\n".join(rows))
    config = ALTERNATING.replace("TEXT", str(lab / "text")).replace("PROPOSITIONS", str(lab / "propositions.jsonl"))
    (lab / "alternating.py").write_text(config)


def test_lines_of_alternating_batches_have_both_kinds(lab):
    """A line that is written every three steps has the newest batch of language and the newest of teachers."""
    write_alternating(lab)
    every, third = lab / "alternating_1", lab / "alternating_3"
    start(lab, "never", every, config="alternating.py")
    start(lab, "never", third, "--config.log_every=3", config="alternating.py")
    names = ("language_loss", "bits_per_byte", "teacher_loss", "judgement_accuracy")
    every_line = {line["step"]: line for line in read_metrics(every) if line["kind"] == "train"}
    assert [every_line[step]["teacher_loss"] is None for step in range(1, 9)] in ([True, False] * 4, [False, True] * 4)
    for line in read_metrics(third):
        if line["kind"] == "train":
            step = line["step"]
            assert line["loss"] == every_line[step]["loss"]
            for name in names:
                newest = every_line[step][name] if every_line[step][name] is not None else every_line[step - 1][name]
                assert line[name] == newest, (step, name)
            assert None not in [line[name] for name in names]
