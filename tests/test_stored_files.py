"""Damaged files of a run, and those of older versions: one line that names the file and the entry."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from conftest import TINY
from report_runs import make_workdir, read_lines, write_lines

from flmjax import cli
from flmjax.config import ConfigError, DataConfig, OptimizerConfig, RunConfig, StageConfig, from_stored, to_stored
from flmjax.data.prepare import prepare
from flmjax.training.state import init_state, state_spec, to_items
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.position import position_at


def change(path: Path, *keys: str, value: object = None) -> None:
    """Set an entry of a JSON file, or remove it without a value."""
    stored = entry = json.loads(path.read_text())
    for key in keys[:-1]:
        entry = entry[int(key) if isinstance(entry, list) else key]
    entry.pop(keys[-1]) if value is None else entry.update({keys[-1]: value})
    path.write_text(json.dumps(stored))


def refusal(capsys, *argv: str) -> str:
    """The one line that refuses a command."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "validation", "growth", "sample"])
@pytest.mark.parametrize("key", ["stage", "tokens", "flops"])
def test_a_line_of_metrics_without_an_entry_is_named(kind, key, tmp_path, capsys):
    if (kind, key) in (("sample", "tokens"), ("sample", "flops")):
        return
    make_workdir(tmp_path)
    lines = read_lines(tmp_path)
    line = next(line for line in lines if line["kind"] == kind)
    del line[key]
    write_lines(tmp_path, lines)
    error = refusal(capsys, "report", f"--workdir={tmp_path}")
    assert f"{tmp_path / 'metrics.jsonl'}: the {kind} line of step {line['step']} has no '{key}'" in error


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("train", "tokens_per_second", "fast"),
        ("train", "loss", [1.0]),
        ("train", "tokens", "many"),
        ("train", "stage", 3),
        ("growth", "seconds", "1.5"),
        ("growth", "from_stage", 3),
        ("validation", "bits_per_byte", {}),
        ("sample", "text", 3),
    ],
)
def test_a_line_of_metrics_with_another_type_is_named(kind, key, value, tmp_path, capsys):
    make_workdir(tmp_path)
    lines = read_lines(tmp_path)
    next(line for line in lines if line["kind"] == kind)[key] = value
    write_lines(tmp_path, lines)
    error = refusal(capsys, "report", f"--workdir={tmp_path}")
    assert f"the {kind} line of step" in error
    assert f"has {key}={value!r}" in error


@pytest.mark.parametrize("step", ["Infinity", "-Infinity", "NaN", "null", "[]"])
def test_a_step_that_is_no_number_is_named(step, tmp_path, capsys):
    make_workdir(tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "train", "step": {step}}}\n{text}')
    assert "line 1 is not a line of metrics" in refusal(capsys, "report", f"--workdir={tmp_path}")


@pytest.mark.parametrize("entry", ['{"seconds": {"updates": "3"}}', '{"versions": []}', '{"seconds": []}', "3"])
def test_a_damaged_line_of_the_starts_is_named(entry, tmp_path, capsys):
    make_workdir(tmp_path)
    (tmp_path / "starts.jsonl").write_text(entry + "\n")
    error = refusal(capsys, "report", f"--workdir={tmp_path}")
    assert f"{tmp_path / 'starts.jsonl'}: line 1 is not an entry of a start" in error


# ---- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5", '"exact"', "[]", "null", "true"])
def test_a_certificate_that_is_no_object_is_named(text, tmp_path, capsys):
    make_workdir(tmp_path)
    path = tmp_path / "certificates" / "step_00000004.json"
    path.write_text(text)
    assert f"{path} is no JSON object" in refusal(capsys, "report", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("step",), None, "has no 'step'"),
        (("step",), [4], "has step=[4]"),
        (("max_difference",), 5, "has max_difference=5"),
        (("rounding",), 5, "has rounding=5"),
        (("row",), [1], "has row=[1]"),
        (("row", "run"), 3, "has row.run=3"),
        (("sizes",), [1], "has sizes=[1]"),
        (("sizes", "embed_dim"), 8, "has sizes.embed_dim=8"),
        (("sizes", "embed_dim"), [4, 8, 9], "has sizes.embed_dim=[4, 8, 9], not a pair"),
        (("gradient_norm",), 1.5, "has gradient_norm=1.5"),
        (("gradient_norm",), [1.5], "has gradient_norm=[1.5], not a pair"),
    ],
)
def test_a_damaged_entry_of_a_certificate_is_named(keys, value, words, tmp_path, capsys):
    make_workdir(tmp_path)
    path = tmp_path / "certificates" / "step_00000004.json"
    change(path, *keys, value=value)
    assert f"{path} {words}" in refusal(capsys, "report", f"--workdir={tmp_path}")


# ---- config.json -----------------------------------------------------------------------------------------------------


def test_the_tolerance_of_older_versions_is_left_out():
    """It was relative to max |logit|: 2e-5 is no multiple of the own rounding, and a run that has it goes on."""
    stored = to_stored(RunConfig())
    stored["config"]["certificate_tolerance"] = 2e-5
    assert from_stored(stored, "config.json") == RunConfig()
    stored["config"]["certificate_tolerances"] = 2e-5
    with pytest.raises(ConfigError, match="has no field 'certificate_tolerances'"):
        from_stored(stored, "config.json")


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("config", "model", "num_heads"), 0, "model.num_heads=0 must be positive"),
        (("config", "model", "num_kv_heads"), 3, "num_heads=1 is not a multiple of num_kv_heads=3"),
        (("config", "stages"), [], "stages is empty"),
        (("config", "stages", "0", "steps"), 0, "stages[0].steps=0 must be positive"),
        (("config", "stages", "0", "name"), "large", "stages have the same name"),
    ],
)
def test_a_setting_that_cannot_be_is_named_when_config_json_is_read(keys, value, words, tmp_path, capsys):
    make_workdir(tmp_path)
    path = tmp_path / "config.json"
    change(path, *keys, value=value)
    for command in ("report", "train", "prepare"):
        error = refusal(capsys, command, f"--workdir={tmp_path}")
        assert f"{path} cannot be read as a config: " in error
        assert words in error


# ---- meta.json -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data of two sources, and their settings."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i}.txt").write_text(f"text number {i} " * 9)
    settings = DataConfig(sources=(str(folder / "text"),), vocabulary="bytes")
    prepare(settings, folder / "data")
    return folder, settings


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("settings",), None, "has no 'settings'"),
        (("settings",), [], "has settings=[]"),
        (("files",), None, "has no 'files'"),
        (("files",), 3, "has files=3"),
        (("files", "tokenizer.json"), 3, "has tokenizer.json=3"),
        (("files", "tokenizer.json", "sha256"), None, "the file 'tokenizer.json' has no 'sha256'"),
        (("files", "tokenizer.json", "bytes"), "3", "the file 'tokenizer.json' has bytes='3'"),
        (("sources",), None, "has no 'sources'"),
        (("sources", "SOURCE"), 3, "SOURCE=3"),
        (("sources", "SOURCE", "slug"), None, "the source 'SOURCE' has no 'slug'"),
        (("sources", "SOURCE", "validation"), None, "the source 'SOURCE' has no 'validation'"),
        (("sources", "SOURCE", "train", "tokens"), None, "the source 'SOURCE', train has no 'tokens'"),
        (("sources", "SOURCE", "train", "documents"), True, "the source 'SOURCE', train has documents=True"),
        (("validation_gzip_bits_per_byte",), None, "has no 'validation_gzip_bits_per_byte'"),
    ],
)
def test_a_damaged_description_of_data_is_named(keys, value, words, data, tmp_path):
    folder, settings = data
    (source,) = settings.sources
    shutil.copytree(folder / "data", tmp_path / "data")
    change(tmp_path / "data" / "meta.json", *(key.replace("SOURCE", source) for key in keys), value=value)
    with pytest.raises(ConfigError) as refused:
        prepare(settings, tmp_path / "data")
    assert str(refused.value).startswith(str(tmp_path / "data" / "meta.json"))
    assert words.replace("SOURCE", source) in str(refused.value)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("[]", "is no JSON object"),
        ("3", "is no JSON object"),
        ('{"tokenizer": {}}', ": tokenizer has no 'vocab_size'"),
        ('{"tokenizer": {"vocab_size": "9"}}', ": tokenizer has vocab_size='9'"),
        ('{"tokenizer": 3}', " has tokenizer=3"),
        ('{"sources": {"a": {}}}', ": the source 'a' has no 'train'"),
        ('{"sources": {"a": 3}}', " has a=3"),
    ],
)
def test_a_report_names_the_damaged_description_of_data(meta, words, tmp_path, capsys):
    make_workdir(tmp_path)
    (tmp_path / "data" / "meta.json").write_text(meta)
    error = refusal(capsys, "report", f"--workdir={tmp_path}")
    assert f"{tmp_path / 'data' / 'meta.json'}{words if words[0] in ' :' else f' {words}'}" in error


# ---- metadata of a checkpoint ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device_mesh):
    """A workdir with a checkpoint at step 1 alone."""
    folder = tmp_path_factory.mktemp("run")
    spec = state_spec(TINY, OptimizerConfig(), one_device_mesh)
    config = RunConfig(model=TINY, stages=(StageConfig(steps=3, batch_size=4),))
    meta = {**to_stored(config), "stage": 0, "samples_seen": 4, "fingerprint": "f", "newest_metrics": {"loss": 1.5}}
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, to_items(init_state(spec, 0)), meta)
        checkpoints.wait()
    return folder, jax.tree.map(lambda x: x, spec.abstract)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("newest_metrics",), 3, "has newest_metrics=3"),
        (("newest_metrics",), [], "has newest_metrics=[]"),
        (("newest_metrics", "loss"), "low", "has loss='low'"),
        (("stage",), True, "has stage=True"),
        (("fingerprint",), None, "has no 'fingerprint'"),
        (("config", "model", "num_heads"), 0, "cannot be read as a config: model.num_heads=0 must be positive"),
        (("config", "stages"), [], "cannot be read as a config: stages is empty"),
        (("checksums",), None, "has no 'checksums'"),
        (("checksums",), 3, "has checksums=3"),
    ],
)
def test_damaged_metadata_of_a_checkpoint_is_named(keys, value, words, workdir, tmp_path):
    """JSON's null is no value either: the newest metrics of a checkpoint were null."""
    folder, abstract = workdir
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    (meta,) = (tmp_path / "checkpoints" / "1" / "meta").glob("metadata")
    change(meta, *keys, value=value)
    change(meta, "digest")  # older versions wrote none; with it, the change would be damage
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints, pytest.raises(ConfigError) as refused:
        checkpoints.restore(position_at(tmp_path, 1).step, to_items(abstract))
    assert str(refused.value).startswith(f"checkpoint {tmp_path / 'checkpoints' / '1'}: its metadata")
    assert words in str(refused.value)
