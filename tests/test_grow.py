"""Growth between runs, `flmjax grow`, in subprocesses: what it takes, refuses, writes and leaves."""

import json
import re
import shlex
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_cases import batches, make_lab, start

from flmjax import cli
from flmjax.config import ConfigError, DataConfig, RunConfig
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import load
from flmjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from flmjax.report.run_record import read_run
from flmjax.training.grow_checkpoint import check_vocabulary, plan_checkpoint, vocabulary_fault
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import read_metrics
from flmjax.workdir.paths import Parent, read_config, read_parent
from flmjax.workdir.starts import read_starts


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the run `straight` and the config big.py of a larger model: run_cases.make_lab."""
    return make_lab(tmp_path_factory.mktemp("lab"))


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


def test_a_dry_run_without_a_workdir_looks_at_no_data_folder(lab, tmp_path, monkeypatch, capsys):
    """Another run's data/ in the current folder was refused for its vocabulary."""
    monkeypatch.chdir(tmp_path)
    data = DataConfig(sources=(str(Path(__file__).parents[1] / "tests" / "*.py"),), vocab_size=600)
    prepare(data, Path("data"))
    argv = ["grow", f"--config={lab / 'big.py'}", f"--source={lab / 'straight'}", "--dry-run"]
    assert cli.main(argv) == 0
    assert "dry run" in capsys.readouterr().out
    assert cli.main([*argv, f"--workdir={tmp_path}"]) == 2
    refusal = capsys.readouterr().err
    assert f"; another --workdir (or no {tmp_path / 'data'}) takes the source's" in refusal


def test_growth_takes_the_newest_checkpoint_when_its_own_is_deleted(lab, tmp_path, monkeypatch, capsys):
    """The source is in training while the data of the new run are prepared."""
    source = tmp_path / "source"
    shutil.copytree(lab / "straight", source)

    def prepare_slowly(*args, **kwargs):
        shutil.rmtree(source / "checkpoints" / "30", ignore_errors=True)
        return prepare(*args, **kwargs)

    monkeypatch.setattr("flmjax.training.grow_checkpoint.prepare", prepare_slowly)
    argv = ["grow", f"--config={lab / 'big.py'}", f"--source={source}", f"--workdir={tmp_path / 'grown'}"]
    assert cli.main([*argv, "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]) == 0
    assert f"{source}: the checkpoint at step 30 is gone; that at step 25 is grown" in capsys.readouterr().out
    assert read_parent(tmp_path / "grown").step == 25


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_grown_checkpoint_has_its_certificate_and_trains_on(lab, weights_only):
    workdir, source = lab / f"grown{weights_only}", lab / f"source{weights_only}"
    shutil.copytree(lab / "straight", source)
    for path in (source / "data").glob("*.u*"):  # archived: the vocabulary alone is needed
        path.unlink()
    flags = [f"--source={source}", *["--weights-only"] * weights_only]
    before = sorted(path for path in source.rglob("*"))
    shown = start(lab, "never", workdir, *flags, command="grow", config="big.py").stdout
    assert f"{source} step 30 -> big by 'zero' (exact); num_layers 2 -> 3, embed_dim 48 -> 60" in shown
    assert "training starts at sample 0, and samples may repeat" in shown  # max_length differs
    assert sorted(path for path in source.rglob("*")) == before
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
        (["--config.model.embed_dim=40"], "embed_dim would shrink from 48 to 40", 2),
        (["--config.model.attention=cudnn"], "cudnn' needs an NVIDIA GPU", 2),
        (
            ["--config.model.activation=swiglu", "--config.model.bias=False", "--config.model.norm_eps=1e-5"],
            r"with --config.model.norm_eps=5.3\d+e-06 --config.model.activation=gelu --config.model.bias=True",
            2,
        ),
        (["--config.stages[0].growth.family=zeros"], "did you mean zero", 2),
        (["--config.stages[0].growth.family=learned"], "grows in a run, not between runs.*make the larger model", 2),
    ],
)
def test_impossible_growth_is_refused_before_any_file_is_written(lab, flags, words, status):
    workdir = lab / "refused"
    flags = [f"--source={lab / 'straight'}", *flags]  # of a repeated flag the last one counts
    result = start(lab, "never", workdir, *flags, command="grow", config="big.py", expect=status)
    assert re.search(words, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not workdir.exists()


def test_a_vocabulary_with_other_words_for_old_ids_is_refused(lab):
    old = ByteTokenizer()
    assert vocabulary_fault(old, ByteTokenizer()) is None
    larger = SimpleNamespace(fingerprint="more", vocab_size=258, end_id=256, decode=old.decode)
    assert vocabulary_fault(old, larger) is None
    assert vocabulary_fault(larger, old) == "it has 257 ids, there are 258"
    assert vocabulary_fault(old, ByteTokenizer(3, 1, 259)) == "its end id is 1, there 256"
    pieces = SentencePieceTokenizer.train(["some words of text", "and some more words of it"] * 50, 290)
    same_end = SimpleNamespace(fingerprint="pieces", vocab_size=290, end_id=256, decode=pieces.decode)
    assert vocabulary_fault(old, same_end).startswith("id 0 means ")


TEACHERS = """
import dataclasses, importlib.util
from flmjax.config import *

def get_config():
    spec = importlib.util.spec_from_file_location("first", r"CONFIG")
    first = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first)
    config = from_config_dict(first.get_config())
    data = DataConfig(
        sources=(r"TEXT",), teachers=(r"PROPOSITIONS",), mixture_weights=(0.5, 0.5), VOCABULARY
    )
    return to_config_dict(dataclasses.replace(config, data=data))
"""


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_source_on_a_store_is_named_by_its_url(kind, url, tmp_path):
    """Its reading copy is gone when the refusal is read, and a setting cannot name a URL."""
    (tmp_path / "data").mkdir()
    (tmp_path / ".origin.json").write_text(json.dumps({"url": url}))
    if kind == "bytes":
        ByteTokenizer(3, 1, 259).save(tmp_path / "data")  # no setting names it
    else:
        SentencePieceTokenizer.train(["some words of text", "and some more words of it"] * 50, 290).save(
            tmp_path / "data"
        )
    config = RunConfig(data=DataConfig(vocabulary="bytes"))
    with pytest.raises(ConfigError) as refused:
        check_vocabulary(config, tmp_path, SimpleNamespace(config=RunConfig()), None)
    cure = "directory=DATA" if kind == "bytes" else "vocabulary=DATA/tokenizer.model"
    words = f"; copy {url}/data to a local folder, DATA; --config.data.{cure} takes the source's"
    assert str(refused.value).endswith(words)
    with pytest.raises(ConfigError, match=f"^--source={url} is no workdir of a run"):
        plan_checkpoint(config, tmp_path, None)


@pytest.mark.parametrize("vocabulary", ["vocab_size=400", "vocabulary='cl100k', end_id=1432"])
def test_the_printed_cure_of_a_vocabulary_leads_on(lab, vocabulary):
    """It was the folder of the source's data, which have neither the teachers nor the mixture of the new run."""
    rows = [json.dumps({"proposition": f"{i} is a number", "judgement": i % 2 == 0}) for i in range(300)]
    (lab / "propositions.jsonl").write_text("\n".join(rows))
    text = TEACHERS.replace("CONFIG", str(lab / "big.py")).replace("TEXT", str(lab / "text"))
    text = text.replace("PROPOSITIONS", str(lab / "propositions.jsonl")).replace("VOCABULARY", vocabulary)
    (lab / "teachers.py").write_text(text)
    workdir, flags = lab / f"teachers{len(vocabulary)}", [f"--source={lab / 'straight'}"]
    refusals = [
        start(lab, "never", workdir, *flags, *dry, command="grow", config="teachers.py", expect=2).stderr
        for dry in ([], ["--dry-run"])
    ]
    assert not workdir.exists()
    cure = re.search(r"; (--config.*) takes the source's\n", refusals[0])[1]
    assert cure == "--config.data.vocabulary=bytes" + " --config.data.end_id=None" * ("end_id" in vocabulary)
    assert cure in refusals[1]
    shown = start(lab, "never", workdir, *flags, *shlex.split(cure), command="grow", config="teachers.py").stdout
    assert "by 'zero' (exact)" in shown


def test_growth_without_a_config_takes_the_rest_from_the_source(lab):
    """The sizes alone are stated; the data go on where the source stopped."""
    workdir, source = lab / "stated", lab / "straight"
    flags = [f"--source={source}", "--config.stages[0].embed_dim=60", "--config.stages[0].head_dim=20"]
    flags += ["--config.stages[0].steps=2"]
    shown = start(lab, "never", workdir, *flags, command="grow", config=None).stdout
    assert "embed_dim 48 -> 60, head_dim 16 -> 20" in shown
    assert f"data: training goes on at sample 150, where {source} stopped" in shown
    config, old = read_config(workdir), read_config(source).schedule[-1].model
    assert (config.model.num_layers, config.model.rotary_dim, config.model.dropout) == (2, 16, 0.1)
    assert config.model.norm_eps == pytest.approx(old.norm_eps * 48 / 60)
    assert [stage.name for stage in config.stages] == ["grown"]
    (lab / "stored.py").write_text(
        f"from pathlib import Path\nfrom flmjax.workdir.paths import read_config\n"
        f"from flmjax.config import to_config_dict\n"
        f"def get_config():\n    return to_config_dict(read_config(Path({str(workdir)!r})))\n"
    )
    start(lab, "never", workdir, config="stored.py")
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.meta(0)["samples_seen"] == 150
        assert checkpoints.meta(2)["samples_seen"] == 162
    tokens = 15 * 4 * 32 + 15 * 6 * 32
    assert read_parent(workdir) == Parent(str(source.resolve()), 30, "large", tokens, first_sample=150)
    starts = read_starts(workdir)
    assert [(entry["first_step"], entry["last_step"]) for entry in starts] == [(0, 0), (0, 2)]
    assert [" grow " in entry["command"] for entry in starts] == [True, False]
    assert starts[0]["seconds"]["growth"] > 0
    stream = TrainingStream.of_run(config, load(source / "data"))
    mixture = read_run(workdir).mixture
    assert mixture is not None
    assert mixture.epochs == stream.epochs(162)
    first = next(stream.batches(start=150, batch_size=6, threads=0))
    assert batches(workdir)[0] == {str(zlib.crc32(first["tokens"].tobytes()))}


@pytest.mark.parametrize("moment", ["growth", "saving:1"])
def test_killed_growth_leaves_no_workdir_and_starts_anew(lab, moment):
    workdir, flags = lab / f"cut_{moment[:6]}", [f"--source={lab / 'straight'}"]
    start(lab, moment, workdir, *flags, command="grow", config="big.py", expect=-9)
    assert not (workdir / "config.json").exists()
    result = start(lab, "never", workdir, config="big.py", expect=2)  # never from scratch
    assert "growth that was cut off" in result.stderr
    assert f"again: flmjax grow --source={lab / 'straight'} --workdir={workdir}\n" in result.stderr
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
