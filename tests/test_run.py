"""Whole runs in processes of their own: killed, resumed, starved of disk. A kill costs its last interval at most."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flmjax.config import ConfigError, MeshConfig, from_config_dict
from flmjax.data.loader import TrainingStream
from flmjax.data.prepared import load
from flmjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.model.loss import loss_sums
from flmjax.sharding.mesh import make_mesh
from flmjax.training.grow_checkpoint import check_vocabulary
from flmjax.training.state import state_spec
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import read_metrics

CONFIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=32, dropout=0.1)
    small = StageConfig(name="small", steps=15, batch_size=4, learning_rate=3e-3, schedule="constant")
    mask = GrowthConfig("mask", ramp_steps=8)
    large = StageConfig(
        name="large", steps=15, batch_size=6, microbatches=2, growth=mask, embed_dim=48, num_layers=2
    )
    return to_config_dict(RunConfig(
        model=model,
        stages=(small, large),
        data=DataConfig(sources=(r"TEXT",), vocabulary="bytes"),
        checkpoint=CheckpointConfig(every=5, keep=2),
        log_every=1,
        evaluate_every=10,
        evaluation_rows=8,
        sample_tokens=8,
    ))
"""


BIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(
        num_layers=3, embed_dim=60, num_heads=4, head_dim=20, mlp_dim=80, max_length=40, dropout=0.1,
        norm_eps=1e-5 * 32 / 60, rotary_dim=16,
    )
    stage = StageConfig(name="big", steps=4, batch_size=4, learning_rate=1e-4, schedule="constant")
    data = DataConfig(sources=(r"TEXT",), vocabulary="bytes")
    return to_config_dict(RunConfig(model=model, stages=(stage,), data=data, log_every=1, evaluation_rows=8))
"""

ALTERNATING = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=64)
    stage = StageConfig(name="judge", steps=8, batch_size=4, learning_rate=1e-3, schedule="constant")
    data = DataConfig(
        sources=(r"TEXT",), teachers=(r"PROPOSITIONS",), vocabulary="bytes", mixture_weights=(0.5, 0.5),
        teacher_mixing="alternating",
    )
    return to_config_dict(RunConfig(model=model, stages=(stage,), data=data, log_every=1, evaluation_rows=8))
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with text, a config, a compile cache, and one run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("lab")
    rng = random.Random(0)
    words = [f"w{rng.randrange(1000)}" for _ in range(200)]
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(300)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text")))
    (folder / "big.py").write_text(BIG.replace("TEXT", str(folder / "text")))
    start(folder, "never", folder / "straight")
    return folder


def start(
    lab: Path,
    when: str,
    workdir: Path,
    *flags: str,
    expect: int = 0,
    command: str = "train",
    config: str = "config.py",
    devices: int = 1,
) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(lab / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "DRIVER_LOG": str(workdir) + ".batches",
    }
    driver = Path(__file__).parent / "driver.py"
    line = [sys.executable, str(driver), when, command, f"--config={lab / config}", f"--workdir={workdir}"]
    result = subprocess.run([*line, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def batches(workdir: Path) -> dict[int, set[str]]:
    """Checksums of the tokens that each step ever saw."""
    seen: dict[int, set[str]] = {}
    for line in Path(str(workdir) + ".batches").read_text().splitlines():
        step, checksum = line.split()
        seen.setdefault(int(step), set()).add(checksum)
    return seen


def same_run(a: Path, b: Path) -> None:
    """Bitwise equal parameters and moments, the same samples at every step, the same metrics but for times."""
    sums = []
    for workdir in (a, b):
        with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
            assert checkpoints.latest_step() == 30
            sums.append(checkpoints.meta(30)["checksums"])
    assert sums[0] == sums[1]
    assert batches(a) == batches(b)
    timeless = [
        [
            {k: v for k, v in line.items() if k not in ("tokens_per_second", "model_flops_utilization", "seconds")}
            for line in lines
        ]
        for lines in (read_metrics(a), read_metrics(b))
    ]
    assert timeless[0] == timeless[1]


def test_a_run_writes_what_it_promises(lab):
    straight = lab / "straight"
    assert sorted(p.name for p in straight.iterdir() if not p.name.startswith(".")) == [
        "certificates", "checkpoints", "config.json", "data", "loss.png", "metrics.jsonl", "report.html", "tensorboard",
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


def test_kill_between_saves_loses_nothing(lab):  # case A01
    workdir = lab / "killed"
    start(lab, "batch:12", workdir, expect=-9)  # the first 11 steps are done, step 10 is saved
    # Step 10 was being written when the kill came: whole or not there.
    assert re.search(r"resume at step (5|10):", start(lab, "never", workdir).stdout)
    same_run(lab / "straight", workdir)


def test_kill_while_the_mask_opens_loses_nothing(lab):
    """Steps 15 to 22 are masked; the checkpoint of step 20 holds what is under the mask, whatever it shows."""
    workdir = lab / "masked"
    start(lab, "saved:22", workdir, expect=-9)
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest_step() == 20
        check_masked_validation(workdir, checkpoints)
    shown = start(lab, "never", workdir).stdout
    assert "resume at step 20:" in shown
    assert "large 23: the growth mask is fully open; training continues without it" in shown
    same_run(lab / "straight", workdir)


def check_masked_validation(workdir: Path, checkpoints: Checkpoints) -> None:
    """The loss that was reported at step 20 is that of what the mask shows: 5 of 8 steps open."""
    config = from_config_dict(checkpoints.meta(20)["config"])
    old, new = config.stage_models
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
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


def test_growth_that_learns_uses_samples_of_its_own(lab):
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
    same_run(lab / "straight", workdir)


def test_kill_while_saving_and_an_empty_folder_cost_one_interval(lab):  # case H02
    workdir = lab / "killed_saving"
    start(lab, "saving:2", workdir, expect=-9)
    (workdir / "checkpoints" / "12").mkdir()  # Orbax alone would take it for the newest
    result = start(lab, "never", workdir)
    assert "resume at step 5" in result.stdout or "resume at step 10" in result.stdout
    assert f"removed {workdir / 'checkpoints' / '12'}: not a complete checkpoint" in result.stderr
    same_run(lab / "straight", workdir)
    assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]


def test_full_disk_stops_the_run_and_spares_the_last_checkpoint(lab):  # case H03
    workdir = lab / "full"
    result = start(lab, "full:2", workdir, expect=1)
    assert "saving in" in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 600
    assert len(batches(workdir)) <= 15  # within one interval of the second save, at step 10
    assert "resume at step 5" in start(lab, "never", workdir).stdout
    same_run(lab / "straight", workdir)


def test_gradients_that_stay_nan_stop_the_run_and_spare_the_last_checkpoint(lab):  # case D04
    workdir = lab / "nan"
    result = start(lab, "nan:8", workdir, "--config.optimizer.max_skipped_updates=3", expect=1)
    assert "step 10: update skipped, not finite: embedding" in result.stderr
    assert "(3 in a row); training stopped with the parameters of step 7" in result.stderr
    assert max(batches(workdir)) <= 11  # one more update was on its way
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 5


def test_damaged_checkpoint_is_named_and_the_one_before_it_works(lab):
    workdir = lab / "damaged"
    shutil.copytree(lab / "straight", workdir)
    shutil.copy(str(lab / "straight") + ".batches", str(workdir) + ".batches")
    step = workdir / "checkpoints" / "30"
    largest = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 255
    largest.write_bytes(data)
    result = start(lab, "never", workdir, expect=1)
    assert f"{step} cannot be read" in result.stderr
    assert "delete that folder to resume from step 25" in result.stderr
    shutil.rmtree(step)
    start(lab, "never", workdir)
    same_run(lab / "straight", workdir)


def test_a_finished_run_is_left_as_it_is_by_the_same_command(lab):
    before = (lab / "straight" / "metrics.jsonl").read_text()
    assert "report" in start(lab, "never", lab / "straight").stdout
    assert (lab / "straight" / "metrics.jsonl").read_text() == before


def test_workdir_of_another_config_is_refused_with_the_fields(lab):
    result = start(lab, "never", lab / "straight", "--config.model.mlp_dim=64", "--config.stages[1].steps=20", expect=2)
    assert "model.mlp_dim: 48 -> 64; stages[1].steps: 15 -> 20" in result.stderr


def test_what_only_says_how_to_run_may_change(lab):
    flags = ("--config.stages[1].microbatches=3", "--config.log_every=5", "--config.model.remat=full")
    start(lab, "never", lab / "straight", *flags)


def test_learning_rate_and_seed_compile_nothing_anew(lab):  # case I06
    flags = ("--config.seed=5", "--config.stages[0].learning_rate=1e-3")
    cached = {p.name for p in (lab / "cache").iterdir()}
    start(lab, "never", lab / "reseeded", *flags)
    new = {p.name for p in (lab / "cache").iterdir()} - cached
    assert not [name for name in new if "train_step" in name or "grow" in name], new


def test_log_of_a_run_is_plain_lines(lab):
    result = start(lab, "batch:3", lab / "log", expect=-9)
    assert "\r" not in result.stdout + result.stderr
    assert "\x1b" not in result.stdout + result.stderr


# ---- flmjax grow -----------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_nothing(lab):
    workdir = lab / "dry"
    flags = [f"--source={lab / 'straight'}", "--dry-run"]
    shown = start(lab, "never", workdir, *flags, command="grow", config="big.py").stdout
    assert re.search(
        r"layers/mlp/up/kernel +\(2, 48, 48\) +-> \(3, 60, 80\) +layers 2 -> 3, new ones fresh; embed", shown
    )
    assert "'zero' from" in shown
    assert "parameters 35,136 -> 104,400; dry run" in shown
    assert not workdir.exists()


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_grown_checkpoint_has_its_certificate_and_trains_on(lab, weights_only):
    workdir = lab / f"grown{weights_only}"
    flags = [f"--source={lab / 'straight'}", *["--weights-only"] * weights_only]
    before = sorted(path for path in (lab / "straight").rglob("*"))
    shown = start(lab, "never", workdir, *flags, command="grow", config="big.py").stdout
    assert "straight step 30 -> big by 'zero' (exact); num_layers 2 -> 3, embed_dim 48 -> 60" in shown
    assert sorted(path for path in (lab / "straight").rglob("*")) == before
    certificate = json.loads((workdir / "certificates" / "step_00000000.json").read_text())
    assert certificate["max_difference"]["float32"] <= 2e-5 * certificate["max_logit"]
    assert certificate["max_difference"]["float64"] <= 1e-12 * certificate["max_logit"]
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        sums = checkpoints.meta(0)["checksums"]
    moments = {path: value for path, value in sums.items() if "/mu/" in path or "/nu/" in path}
    assert len(moments) > 20
    assert any(moments.values()) != weights_only
    assert "resume at step 0: stage big" in start(lab, "never", workdir, config="big.py").stdout
    losses = [line["loss"] for line in read_metrics(workdir) if line["kind"] == "train"]
    assert len(losses) == 4
    assert abs(losses[0] - certificate["loss_after"]) < 0.3


@pytest.mark.parametrize(
    ("flags", "words", "status"),
    [
        (["--source=nowhere"], "nowhere is no workdir of a run", 2),
        (["--config.model.norm_eps=1e-5"], r"growth keeps the function with --config.model.norm_eps=5.3\d+e-06", 2),
        (["--config.model.rotary_dim=None"], "with --config.model.rotary_dim=16", 2),
        (["--config.model.embed_dim=40"], "embed_dim would shrink from 48 to 40", 1),
        (["--config.model.activation=swiglu"], "growth cannot change activation from gelu to swiglu", 1),
        (["--config.stages[0].growth.family=zeros"], "did you mean zero", 2),
        (["--config.stages[0].growth.family=learned"], "grows in a run, not between runs.*make the larger model", 2),
    ],
)
def test_growth_that_cannot_be_is_refused_before_anything_is_written(lab, flags, words, status):
    workdir = lab / "refused"
    flags = [f"--source={lab / 'straight'}", *flags]  # of a flag given twice the last counts
    result = start(lab, "never", workdir, *flags, command="grow", config="big.py", expect=status)
    assert re.search(words, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (workdir / "checkpoints").exists()
    assert not (workdir / "config.json").exists()


def test_a_vocabulary_in_which_an_old_id_means_another_word_is_refused(lab):
    data = lab / "straight" / "data"
    check_vocabulary(data, ByteTokenizer(), Path("new"))
    larger = SimpleNamespace(fingerprint="more", vocab_size=258, end_id=256, decode=ByteTokenizer().decode)
    check_vocabulary(data, larger, Path("new"))
    pieces = SentencePieceTokenizer.train(["some words of text", "and some more words of it"] * 50, 290)
    with pytest.raises(ConfigError, match=r"id \d+ means .*, there .*; --config.data.directory=.*straight/data takes"):
        check_vocabulary(data, pieces, Path("new"))


def test_growth_that_is_killed_leaves_no_workdir_and_starts_anew(lab):
    workdir, flags = lab / "cut", [f"--source={lab / 'straight'}"]
    start(lab, "saving:1", workdir, *flags, command="grow", config="big.py", expect=-9)
    assert not (workdir / "config.json").exists()
    result = start(lab, "never", workdir, config="big.py", expect=2)  # never from scratch
    assert "growth that was cut off" in result.stderr
    for step in (workdir / "checkpoints").glob("[0-9]*"):  # whole, if the kill came late
        shutil.rmtree(step)
    start(lab, "never", workdir, *flags, command="grow", config="big.py")
    assert (workdir / "config.json").exists()
    result = start(lab, "never", workdir, *flags, command="grow", config="big.py", expect=2)
    assert "holds a run already" in result.stderr


def test_growth_goes_to_another_mesh(lab):
    flags = [f"--source={lab / 'straight'}", "--config.mesh.fsdp=2"]
    shown = start(lab, "never", lab / "mesh", *flags, command="grow", config="big.py", devices=2).stdout
    assert "by 'zero' (exact)" in shown
    flags = [f"--source={lab / 'straight'}", "--config.mesh.fsdp=1", "--config.mesh.tensor=4"]
    result = start(lab, "never", lab / "mesh4", *flags, command="grow", config="big.py", devices=4, expect=2)
    assert "straight: num_heads=2 does not divide over mesh axis tensor=4" in result.stderr


def test_a_line_of_alternating_batches_has_the_newest_batch_of_either_kind(lab):
    rows = [json.dumps({"proposition": f"{i} is a number", "judgement": i % 2 == 0}) for i in range(300)]
    (lab / "propositions.jsonl").write_text("\n".join(rows))
    config = ALTERNATING.replace("TEXT", str(lab / "text")).replace("PROPOSITIONS", str(lab / "propositions.jsonl"))
    (lab / "alternating.py").write_text(config)
    every, third = lab / "alternating_1", lab / "alternating_3"
    start(lab, "never", every, config="alternating.py")
    start(lab, "never", third, "--config.log_every=3", config="alternating.py")
    names = ("language_loss", "bits_per_byte", "teacher_loss", "judgement_accuracy")
    own = {line["step"]: line for line in read_metrics(every) if line["kind"] == "train"}
    assert [own[step]["teacher_loss"] is None for step in range(1, 9)] in ([True, False] * 4, [False, True] * 4)
    for line in read_metrics(third):
        if line["kind"] == "train":
            step = line["step"]
            assert line["loss"] == own[step]["loss"]
            for name in names:
                newest = own[step][name] if own[step][name] is not None else own[step - 1][name]
                assert line[name] == newest, (step, name)
            assert None not in [line[name] for name in names]
