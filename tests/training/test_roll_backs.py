"""Runs that go back before a loss spike, and leave samples out: each equals one that never read them, bitwise."""

import dataclasses
import json
import math
import random
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from run_cases import batches, start, write_lab

from flmjax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SpikeConfig,
    StageConfig,
)
from flmjax.report.run_page import write_report
from flmjax.training import loop, spikes
from flmjax.training.spikes import TrainingError
from flmjax.training.start import train
from flmjax.workdir import roll_backs
from flmjax.workdir.checkpoint import CheckpointError, Checkpoints
from flmjax.workdir.metrics import MetricsWriter, read_metrics
from flmjax.workdir.paths import whole_steps
from flmjax.workdir.position import newest_position
from flmjax.workdir.roll_backs import RollBack, read_roll_backs
from flmjax.workdir.starts import read_starts

SMALL = StageConfig(name="small", steps=20, batch_size=8, learning_rate=2e-2, schedule="constant")
LARGE = StageConfig(name="large", steps=8, batch_size=8, embed_dim=48, num_layers=2)


class Killed(BaseException):
    """A process ends here."""


@dataclasses.dataclass
class Lab:
    """Runs on one text. Poisoned batches, by their checksums, have targets that no text has."""

    folder: Path
    config: RunConfig
    poisoned: set[int] = dataclasses.field(default_factory=set)
    value: float = 1.0  # of the weights of a poisoned batch
    batches: dict[int, int] = dataclasses.field(default_factory=dict)  # checksum of the last batch of every update

    def train(self, name: str, **settings) -> Path:
        """Train, or go on with, the run of this name; `batches` has its batches."""
        workdir = self.folder / name
        data = dataclasses.replace(self.config.data, skip_samples=settings.pop("skip_samples", ()))
        train(dataclasses.replace(self.config, data=data, **settings), workdir)
        return workdir


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spikes")
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i}.txt").write_text("".join("ab" * 12 + f"{rng.randrange(1000):03d}" for _ in range(12)))
    return folder


@pytest.fixture
def lab(lab_folder, monkeypatch) -> Lab:
    config = RunConfig(
        model=ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=32, dropout=0.1),
        stages=(SMALL, LARGE),
        data=DataConfig(sources=(str(lab_folder / "text"),), vocabulary="bytes", directory=str(lab_folder / "data")),
        checkpoint=CheckpointConfig(every=4, keep=5),
        spike=SpikeConfig(action="roll_back", window=6, deviations=20.0, roll_back_steps=6, skip_batches=2),
        log_every=3,
        evaluate_every=10,
        evaluation_rows=8,
        certificate_rows=8,
        certificate_float64_below=0,
        sample_tokens=0,
        peak_flops=1e12,
    )
    lab, run_stage = Lab(lab_folder, config), loop.run_stage

    def poisoned(state, spec, stage, rate, batches, *bar):
        def placed():
            for step, batch in enumerate(batches, start=int(state.step) + 1):
                checksum = zlib.crc32(np.asarray(batch["tokens"]).tobytes())
                lab.batches[step] = checksum
                if checksum in lab.poisoned:
                    targets = jax.device_put(np.full(batch["targets"].shape, 122, np.int32), batch["targets"].sharding)
                    batch = {**batch, "targets": targets, "weights": batch["weights"] * lab.value}
                yield batch

        return run_stage(state, spec, stage, rate, placed(), *bar)

    monkeypatch.setattr(loop, "run_stage", poisoned)
    return lab


def straight_batches(lab: Lab) -> dict[int, int]:
    """Checksums of the batches of a run without spikes."""
    if not (lab.folder / "straight").exists():
        lab.train("straight", spike=SpikeConfig())
        (lab.folder / "straight.json").write_text(json.dumps(lab.batches))
    return {int(step): x for step, x in json.loads((lab.folder / "straight.json").read_text()).items()}


def checksums(workdir: Path, end: int = 28) -> dict[str, int]:
    """Checksums of the leaves of the state at the end of a run of `end` steps."""
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest_step() == end
        return checkpoints.meta(end)["checksums"]


def timeless(workdir: Path) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "model_flops_utilization", "seconds")}
        for line in read_metrics(workdir)
        if line["kind"] != "roll_back"
    ]


def assert_same(lab: Lab, workdir: Path, batches: dict[int, int], expected: Path, skip_samples) -> None:
    """Assert that a run which rolled back is one that never read the samples: bits, batches and lines of metrics."""
    if not expected.exists():
        lab.poisoned, lab.batches = set(), {}
        lab.train(expected.name, skip_samples=skip_samples, spike=SpikeConfig())
        Path(f"{expected}.json").write_text(json.dumps(lab.batches))
    assert checksums(workdir) == checksums(expected)
    assert {str(step): x for step, x in batches.items()} == json.loads(Path(f"{expected}.json").read_text())
    assert timeless(workdir) == timeless(expected)
    of_run, of_expected = newest_position(workdir), newest_position(expected)
    assert (of_run.samples_seen, of_run.fingerprint) == (of_expected.samples_seen, of_expected.fingerprint)
    assert of_run.first_sample == 0


@pytest.mark.parametrize(("step", "to_step"), [(15, 8), (22, 16)], ids=["within a stage", "across a growth"])
def test_a_roll_back_is_a_run_that_never_read_the_samples(lab, step, to_step):
    """The batches from the older checkpoint to the spike and two more are left out; nothing else differs."""
    lab.poisoned, lab.batches = {straight_batches(lab)[step]}, {}
    workdir = lab.train(f"rolled_back_{step}")
    (record,) = read_roll_backs(workdir)
    first, end = 8 * to_step, 8 * (step + 2)
    assert (record.from_step, record.to_step, record.first_sample, record.end_sample) == (step, to_step, first, end)
    assert record.is_complete
    assert record.loss > 4
    (line,) = (line for line in read_metrics(workdir) if line["kind"] == "roll_back")
    assert (line["step"], line["from_step"], line["end_sample"]) == (to_step, step, end)
    starts = [(entry["first_step"], entry["last_step"]) for entry in read_starts(workdir)]
    assert starts[1:] == [(to_step, 28)]
    assert starts[0][0] == 0
    assert starts[0][1] >= step
    batches = lab.batches
    assert not lab.poisoned & set(batches.values())
    assert_same(lab, workdir, batches, lab.folder / f"without_{first}_{end}", (f"{first}:{end}",))
    page = write_report(workdir).read_text()
    assert "Roll-backs and samples left out" in page
    assert f"{first:,} to {end - 1:,}" in page
    shutil.rmtree(workdir)


@pytest.mark.parametrize("moment", ["recorded", "removing", "complete", "resumed"])
def test_a_kill_during_a_roll_back_loses_nothing(lab, moment, monkeypatch):
    lab.poisoned, lab.batches = {straight_batches(lab)[22]}, {}

    def die(*_):
        raise Killed

    def remove_one(directory, step):
        newest = whole_steps(directory)[-1]
        assert newest > step
        (directory / str(newest) / "_CHECKPOINT_METADATA").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "recorded":
            patch.setattr(spikes, "barrier", lambda name: die() if name == "a roll-back is recorded" else None)
        elif moment == "removing":
            patch.setattr(roll_backs, "remove_checkpoints_past", remove_one)
        elif moment == "complete":
            done = []
            patch.setattr(
                spikes, "barrier", lambda name: die() if name == "a roll-back is complete" and done else done.append(1)
            )
        else:
            save, steps = Checkpoints.save, []

            def save_until(self, step, items, meta):
                if steps and step < steps[-1]:  # the first save after the roll-back
                    raise Killed
                steps.append(step)
                save(self, step, items, meta)

            patch.setattr(Checkpoints, "save", save_until)
        with pytest.raises(Killed):
            lab.train(moment)
    workdir = lab.train(moment)
    assert [record.is_complete for record in read_roll_backs(workdir)] == [True]
    assert sum(line["kind"] == "roll_back" for line in read_metrics(workdir)) == 1
    assert_same(lab, workdir, lab.batches, lab.folder / "without_128_192", ("128:192",))
    shutil.rmtree(workdir)


def test_newer_checkpoints_stay_until_the_target_is_read(lab, monkeypatch):
    """They were removed before; the target was damaged, and no checkpoint was left."""
    lab.poisoned = {straight_batches(lab)[15]}
    record = spikes.record_roll_back

    def record_and_damage(workdir, roll_back):
        record(workdir, roll_back)
        for step in (4, 8):
            (workdir / "checkpoints" / str(step) / "meta" / "metadata").write_text("{")

    monkeypatch.setattr(spikes, "record_roll_back", record_and_damage)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read .*; nothing was deleted or renamed"):
        lab.train("damaged_target")
    workdir = lab.folder / "damaged_target"
    assert {4, 8, 12} <= set(whole_steps(workdir / "checkpoints"))
    assert [record.is_complete for record in read_roll_backs(workdir)] == [False]


def test_a_second_spike_rolls_back_further_and_the_third_stops(lab):
    """The second range holds the first; a run rolls back as often as the config says."""
    straight = straight_batches(lab)
    lab.poisoned, lab.batches = {straight[18], straight[23]}, {}
    workdir, batches = lab.train("twice"), lab.batches
    lab.batches = {}
    # Back from 18 to 12: samples 96 to 159 are left out. Update 15 reads sample 176: back to 8.
    found = [(r.from_step, r.to_step, r.first_sample, r.end_sample) for r in read_roll_backs(workdir)]
    assert found == [(18, 12, 96, 160), (15, 8, 64, 200)]
    assert [line["step"] for line in read_metrics(workdir) if line["kind"] == "roll_back"] == [12, 8]
    settings = dataclasses.replace(lab.config.spike, max_roll_backs=1)
    with pytest.raises(TrainingError, match=r"^step 15: .* after 1 roll-backs \(spike.max_roll_backs\)"):
        lab.train("once", spike=settings)
    assert whole_steps(lab.folder / "once" / "checkpoints")[-1] == 12
    assert_same(lab, workdir, batches, lab.folder / "without_64_200", ("64:200",))


def test_nans_that_last_are_left_out_too(lab):
    """As long as the config does not say roll_back, they stop the run with its last checkpoint."""
    straight = straight_batches(lab)
    lab.poisoned, lab.value = {straight[13], straight[14], straight[15]}, math.nan
    optimizer = OptimizerConfig(max_skipped_updates=3)
    with pytest.raises(TrainingError, match=r"3 in a row\); training stopped with the parameters of step 12"):
        lab.train("stopped", optimizer=optimizer, spike=SpikeConfig(action="stop", window=6, deviations=20.0))
    assert whole_steps(lab.folder / "stopped" / "checkpoints")[-1] == 12
    workdir = lab.train("stopped", optimizer=optimizer)  # the same run goes on with another action
    (record,) = read_roll_backs(workdir)
    assert (record.from_step, record.to_step, record.loss) == (15, 4, None)
    assert (record.first_sample, record.end_sample) == (8 * 4, 8 * 17)
    assert record.reason == "3 updates in a row not finite"


def test_a_skipped_spike_changes_no_parameter_in_every_run(lab, monkeypatch):
    """The same updates are skipped in a run that was killed: checkpoints keep the losses of the window."""
    straight = straight_batches(lab)
    lab.poisoned = {straight[15], straight[22]}
    settings = dataclasses.replace(lab.config.spike, action="skip")
    workdir = lab.train("skipped", spike=settings)
    lines = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    assert [line["step"] for line in lines if line["spike"]] == [15, 22]
    assert all(line["skipped_updates"] == line["spike"] for line in lines)
    assert "Skipped updates (loss spike): 2." in write_report(workdir).read_text()
    save = Checkpoints.save

    def save_and_die(self, step, items, meta):
        save(self, step, items, meta)
        if step == 20:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        lab.train("skipped_killed", spike=settings)
    monkeypatch.setattr(Checkpoints, "save", save)
    assert checksums(lab.train("skipped_killed", spike=settings)) == checksums(workdir)


def test_samples_that_were_read_cannot_be_skipped_any_more(lab):
    """Others can: the run goes on as if the setting had been there from its start."""
    workdir = lab.train("changed", stages=(SMALL,), spike=SpikeConfig())
    assert newest_position(workdir).samples_seen == 160
    before = sorted(path.name for path in workdir.iterdir())
    for ranges, words in ((("80:96",), "80:96 was read"), (("152:176",), "152:160 was read")):
        with pytest.raises(ConfigError, match=rf"up to sample 160 \(step 20\).*{words}: data.skip_samples may change"):
            lab.train("changed", skip_samples=ranges)
    assert sorted(path.name for path in workdir.iterdir()) == before
    lab.train("changed", skip_samples=("160:176",), spike=SpikeConfig())
    with pytest.raises(ConfigError, match=r"160:176 was skipped: data.skip_samples may change from sample 240 on"):
        lab.train("changed", stages=(SMALL, dataclasses.replace(LARGE, steps=9)), spike=SpikeConfig())
    lab.train("from_start", skip_samples=("160:176",), spike=SpikeConfig())
    assert checksums(workdir) == checksums(lab.folder / "from_start")


def test_norms_are_written_every_n_steps(lab):
    workdir = lab.train("norms", stages=(dataclasses.replace(SMALL, steps=12),), spike=SpikeConfig(), norms_every=5)
    lines = [line for line in read_metrics(workdir) if line["kind"] == "norms"]
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[0]["parameter/layers/mlp/up/kernel"] > 0
    assert {"gradient/embedding", "parameter/final_norm/scale", "stage", "tokens"} <= lines[0].keys()
    board = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert b"norms/gradient/layers/mlp/up/kernel" in board
    assert "norms" not in {line["kind"] for line in read_metrics(lab.train("no_norms", stages=(SMALL,)))}


@pytest.mark.nightly
def test_a_process_killed_in_a_roll_back_goes_on(tmp_path, monkeypatch):
    """kill -9 between the record of a roll-back and the removal of the newer checkpoints."""
    write_lab(tmp_path)
    start(tmp_path, "never", tmp_path / "straight")
    ((poisoned,),) = (checksum for step, checksum in batches(tmp_path / "straight").items() if step == 17)
    monkeypatch.setenv("DRIVER_POISON", poisoned)
    settings = ("spike.action=roll_back", "spike.roll_back_steps=5", "spike.skip_batches=1")
    flags = [f"--config.{name}" for name in (*settings, "optimizer.max_skipped_updates=1", "checkpoint.keep=4")]
    start(tmp_path, "rolling_back", tmp_path / "killed", *flags, expect=-9)
    assert [record.is_complete for record in read_roll_backs(tmp_path / "killed")] == [False]
    shown = start(tmp_path, "never", tmp_path / "killed", *flags).stdout
    (record,) = read_roll_backs(tmp_path / "killed")
    assert f"resume at step {record.to_step}: stage small" in shown  # the spike was in stage large
    skipped = f"--config.data.skip_samples={record.first_sample}:{record.end_sample}"
    start(tmp_path, "never", tmp_path / "without", skipped)
    assert checksums(tmp_path / "killed", 30) == checksums(tmp_path / "without", 30)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_damaged_record_of_a_roll_back_is_named(tmp_path):
    path = tmp_path / "roll_backs.jsonl"
    line = json.dumps(dataclasses.asdict(RollBack(9, 4, 32, 80, 5.5, "loss spike", True)))
    path.write_text(line + "\n")
    assert read_roll_backs(tmp_path) == [RollBack(9, 4, 32, 80, 5.5, "loss spike", True)]
    for damaged, words in (
        ("{", "line 2 is not a record of a roll-back"),
        ('{"from_step": 1}', "line 2 has no 'to_step'"),
    ):
        path.write_text(f"{line}\n{damaged}\n")
        with pytest.raises(ConfigError, match=words):
            read_roll_backs(tmp_path)


def test_lines_of_roll_backs_outlast_a_later_roll_back(tmp_path):
    """Other lines past the step at which a run resumes are removed."""
    for number, (step, to_step) in enumerate(((18, 12), (15, 8), (11, 8)), start=1):
        roll_backs.record_roll_back(tmp_path, RollBack(step, to_step, 8 * to_step, 8 * step, None, "not finite"))
        for _ in range(2):  # the second process finds the line
            with MetricsWriter(tmp_path, to_step) as writer:
                roll_backs.log_roll_backs(tmp_path, writer)
                writer.write("train", to_step + 1, loss=1.0)
        lines = [line["from_step"] for line in read_metrics(tmp_path) if line["kind"] == "roll_back"]
        assert lines == [18, 15, 11][:number]
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "train"] == [9]
