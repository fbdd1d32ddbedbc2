"""The command line: help, every field by flag, every mistake one line with status 2 and nothing written."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import flmjax
from flmjax import cli
from flmjax.cli import parsing
from flmjax.cli.help import EXAMPLES, settings
from flmjax.config import (
    ConfigError,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    from_config_dict,
    to_config_dict,
    to_json,
)
from flmjax.config.validate import validate

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
QUICKSTART = f"--config={Path(__file__).parents[1] / 'configs' / 'quickstart.py'}"
CUDNN = (QUICKSTART, "--config.model.attention=cudnn", "--workdir=WORKDIR")


def complain(capsys, *argv: str) -> str:
    """The one line that a refused command prints."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert len(err) < 500
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tain"], "unknown command 'tain'; did you mean train"),
        (["help", "tain"], "unknown command 'tain'; did you mean train"),
        (["train", "--config=configs/nothing.py", "--help"], "no config file 'configs/nothing.py'"),
        (["train", QUICKSTART], "--workdir is missing"),
        (["train", "--workdir=WORKDIR"], "--config is missing"),
        (["train", QUICKSTART, "--workdir="], "--workdir is missing"),
        (["train", "--config=configs/nothing.py", "--workdir=WORKDIR"], "no config file 'configs/nothing.py'"),
        (["train", QUICKSTART + ":bilingal", "--workdir=WORKDIR"], "'bilingal'; did you mean bilingual"),
        (["train", QUICKSTART, "--wrkdir=WORKDIR"], "unknown flag '--wrkdir'; did you mean workdir?"),
        (
            ["train", QUICKSTART, "--confg.seed=1", "--workdir=WORKDIR"],
            "unknown flag '--confg.seed'; did you mean config?",
        ),
        (["train", QUICKSTART, "--config.model.num_layer=1", "--workdir=WORKDIR"], "did you mean num_layers"),
        (["train", QUICKSTART, "--config.modle.num_layers=1", "--workdir=WORKDIR"], "did you mean model"),
        (["train", QUICKSTART, "--config.stages[0].setps=1", "--workdir=WORKDIR"], "did you mean steps"),
        (["train", QUICKSTART, "--config.stages[9].steps=1", "--workdir=WORKDIR"], "stages[9]"),
        (["train", QUICKSTART, "--config.model.num_layers=many", "--workdir=WORKDIR"], "'many'"),
        (["train", QUICKSTART, "--config.model.norm=layrnorm", "--workdir=WORKDIR"], "did you mean layernorm"),
        (["train", QUICKSTART, "--config.optimizer.clip_norm=abc", "--workdir=WORKDIR"], "must be of type float"),
        (["train", QUICKSTART, "--config.stages[1].embed_dim=64", "--workdir=WORKDIR"], "smaller than 128"),
        (["train", QUICKSTART, "more", "--workdir=WORKDIR"], "'more' is not a flag"),
        (
            ["train", *CUDNN, "--config.data.document_attention=True"],
            "'cudnn' cannot keep the documents of a sequence apart",
        ),
        (["train", *CUDNN, "--config.data.teachers=('hsk_levels',)"], "apart; data.teachers needs that: take 'plain'"),
        (["prepare", QUICKSTART, "--config.data.vocabulary=cl10k", "--workdir=WORKDIR"], "did you mean cl100k"),
        (
            [
                "prepare",
                QUICKSTART,
                "--config.data.mixture=x",
                "--config.data.mixture_weights=0.0",
                "--workdir=WORKDIR",
            ],
            "0.0",
        ),
        (["prepare", QUICKSTART, "--config.data.task_module=m", "--workdir=WORKDIR"], "data.task_module='m' is not"),
        (["prepare", QUICKSTART, "--config.data.true_mark=😡", "--workdir=WORKDIR"], "are both '😡'"),
        (["prepare", QUICKSTART, "--config.data.teacher_weight=0.0", "--workdir=WORKDIR"], "must be positive"),
        (["prepare", QUICKSTART, "--config.data.teacher_mixing=mix", "--workdir=WORKDIR"], "did you mean mixed"),
        (["report", "--workdir=WORKDIR"], "config.json"),
        (["report"], "--workdir is missing; usage: flmjax report --workdir=DIR [--workdir=DIR ...] [--output=DIR]"),
        (["report", "--workdir="], "--workdir is missing"),
        (
            ["report", "--workdir=WORKDIR", "--workdir=WORKDIR/"],
            "is the folder of another --workdir; name each",
        ),
        (["report", "--workdir=WORKDIR", "--workdir=WORKDIR/other"], "config.json does not exist"),
        (["plan", QUICKSTART, "--workdir=WORKDIR"], "'flmjax plan' takes no --workdir; usage: flmjax plan --config="),
        (["report", QUICKSTART, "--workdir=WORKDIR"], "'flmjax report' takes no --config; usage: flmjax report --work"),
        (["train", QUICKSTART, "--dry-run", "--workdir=WORKDIR"], "'flmjax train' takes no --dry-run"),
        (["plan", QUICKSTART + ":BILINGUAL"], "'BILINGUAL'; did you mean bilingual"),
        (["plan", QUICKSTART, "--outptu=x"], "unknown flag '--outptu'; did you mean output"),
        (["prepare", QUICKSTART, "--inspect"], "--inspect has no value; usage: flmjax prepare --config=FILE"),
        (["train", QUICKSTART, "--workdir", "--config.seed=1"], "--workdir has no value; usage: flmjax train"),
        (
            ["train", QUICKSTART, "--workdir=w", "--noconfig.model.bias=true"],
            "bias=true does not take an argument",
        ),
        (["prepare", QUICKSTART, "--inspect=x"], "flmjax: --inspect=x must be an integer that is not negative"),
        (["plan", QUICKSTART, "--price=-1"], "flmjax: --price=-1 must be a positive number"),
        (["grow", "--dry-run=x"], "flmjax: --dry-run=x must be True or False"),
        (["train", QUICKSTART, "--noconfig.seed", "--workdir=WORKDIR"], "noconfig.seed"),
    ],
)
def test_mistakes_are_answered_in_one_line(capsys, tmp_path, argv, words):
    workdir = tmp_path / "run"
    assert words in complain(capsys, *[a.replace("WORKDIR", str(workdir)) for a in argv])
    assert not workdir.exists()


def test_a_typo_in_a_config_file_or_a_dictionary_is_refused(capsys, tmp_path):
    file = tmp_path / "typo.py"
    head = "from flmjax.config import *\ndef get_config():\n    config = to_config_dict(RunConfig())\n"
    file.write_text(head + "    config.model.num_layer = 3\n    return config\n")
    error = complain(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'w'}")
    assert error == f"flmjax: {file}:4: the config has no field 'num_layer'; did you mean num_layers, num_heads?\n"
    with pytest.raises(ConfigError, match=r"config.model has no field 'num_layer'; did you mean num_layers"):
        from_config_dict({"model": {"num_layer": 3}})
    with pytest.raises(ConfigError, match="must be of type int"):
        from_config_dict({"seed": "one"})


def fields(cls: type, path: str = "") -> list[tuple[str, typing.Any, typing.Any]]:
    """(path, type, default) of every plain field below a dataclass."""
    leaves = []
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            leaves += fields(hint, f"{path}{field.name}.")
        elif field.name == "stages":
            leaves += fields(StageConfig, f"{path}stages[0].")
        else:
            leaves.append((path + field.name, hint, field.default))
    return leaves


def values_for(hint: typing.Any, default: typing.Any) -> list[tuple[str, typing.Any]]:
    """(text of a flag, value that it sets) for values that differ from the default."""
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if type(None) in typing.get_args(hint):
        return [("None", None), *values_for(args[0], default)]
    if typing.get_origin(hint) is typing.Literal:
        return [(word, word) for word in args if word != default]
    if typing.get_origin(hint) is tuple:
        item = values_for(args[0], None)[0]
        return [(f"({item[0]!r},)" if args[0] is str else f"({item[0]},)", (item[1],))]
    by_type = {bool: (str(not default), not default), int: ("7", 7), float: ("0.25", 0.25), str: ("word", "word")}
    return [by_type[hint]]


def test_every_field_can_be_set_by_flag(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("from flmjax.config import *\ndef get_config():\n    return to_config_dict(RunConfig())\n")
    assert len(fields(RunConfig)) > 60
    for path, hint, default in fields(RunConfig):
        for text, value in values_for(hint, default):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parsing, "validate", lambda config: config)
                _, config, *_ = cli.parse(["train", f"--config={file}", f"--config.{path}={text}", "--workdir=w"])
            field = config
            for name in path.replace("[0]", ".0").split("."):
                field = field[int(name)] if name.isdigit() else getattr(field, name)
            assert field == value, path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_freeze_and_survive_json(path):
    _, config, *_ = cli.parse(["train", f"--config={path}", "--workdir=w"])
    assert from_config_dict(json.loads(json.dumps(to_json(config)))) == config
    assert from_config_dict(to_config_dict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_output_into_a_closed_pipe_ends_without_a_word():
    for arguments in (f"train {QUICKSTART} --help", f"plan --config={CONFIGS[0].parent}/flm_101b.py --cost-only"):
        command = f"{sys.executable} -m flmjax {arguments} | head -1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert done.stdout.count("\n") == 1
        assert done.stderr == ""


def test_work_that_a_closed_pipe_cuts_off_is_no_success():
    """`flmjax train | head -3 && next` went on with a run that had stopped."""
    command = f"{sys.executable} -m flmjax plan --config={CONFIGS[0].parent}/flm_101b.py --cost-only | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(("target", "status"), [("/dev/full", 1), ("&-", 0)])
@pytest.mark.parametrize("arguments", ["--help", f"plan --config={CONFIGS[0].parent}/flm_101b.py --cost-only"])
def test_output_that_cannot_be_written_is_at_most_one_line(arguments, target, status):
    command = f"{sys.executable} -m flmjax {arguments} > {target}".replace("> &-", ">&-")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (status, status), done.stderr
    assert "No space left on device" in done.stderr or target == "&-"


def test_flags_come_from_a_flag_file_too(tmp_path):
    (tmp_path / "flags").write_text(f"{QUICKSTART}\n--config.seed=11\n--workdir=elsewhere\n")
    _, config, workdir, _ = cli.parse(["train", f"--flagfile={tmp_path / 'flags'}"])
    assert (config.seed, str(workdir)) == (11, "elsewhere")


def test_a_workdir_that_cannot_be_written_is_named(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for flags in (["train", QUICKSTART, "--workdir=FOLDER"], ["plan", QUICKSTART, "--output=FOLDER"]):
        for folder in (file, file / "run"):
            error = complain(capsys, *(flag.replace("FOLDER", str(folder)) for flag in flags))
            assert f"={folder}: {file} is a file; name a folder" in error
    assert file.read_text() == "in the way"


def two_stages(growth, **fields):
    return RunConfig(stages=(StageConfig(name="a"), StageConfig(name="b", growth=growth, **fields)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_clip_norm_that_cannot_be_is_refused(value):
    with pytest.raises(ConfigError, match=r"optimizer.clip_norm=.* must be (positive|a finite number)"):
        validate(RunConfig(optimizer=OptimizerConfig(clip_norm=value)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RunConfig(stages=()), "stages is empty"),
        (RunConfig(stages=(StageConfig(), StageConfig())), "same name"),
        (RunConfig(model=ModelConfig(num_heads=6, num_kv_heads=4)), "num_heads=6 is not a multiple of num_kv_heads=4"),
        (RunConfig(model=ModelConfig(head_dim=7)), "head_dim=7 must be even"),
        (RunConfig(stages=(StageConfig(batch_size=6, microbatches=4),)), "batch_size=6 is not a multiple"),
        (RunConfig(stages=(StageConfig(warmup_steps=100),)), "warmup_steps=100 must be less than steps=100"),
        (RunConfig(stages=(StageConfig(growth=GrowthConfig("zoro")),)), "did you mean zero"),
        (
            two_stages(GrowthConfig(ramp_steps=3)),
            r"stages\[1\].growth.ramp_steps=3 is not read by family 'zero', only by 'mask'",
        ),
        (two_stages(GrowthConfig("mask")), "ramp_steps=0 must be 1 to the stage's steps=100 for family 'mask'"),
        (two_stages(GrowthConfig("perturb", shrink=1.5)), r"growth.shrink=1.5 must lie in \[0, 1\]"),
        (two_stages(GrowthConfig(split="equal")), "split=equal is not read by family 'zero', only by 'duplicate'"),
        (
            RunConfig(stages=(StageConfig(growth=GrowthConfig(rate_policy="rewind")),)),
            "the first stage starts a schedule",
        ),
        (RunConfig(certificate_roundings=float("nan")), "certificate_roundings=nan must be a finite number"),
        (
            RunConfig(
                model=ModelConfig(num_heads=8, num_kv_heads=2),
                stages=(StageConfig(name="a"), StageConfig(name="b", num_heads=9, num_kv_heads=3)),
            ),
            r"stages\[1\]: 8 query heads in 2 groups cannot become 9 in 3",
        ),
        (two_stages(GrowthConfig(rate_policy="rewram")), "did you mean rewarm"),
        (two_stages(GrowthConfig(), learning_rate=0.5), r"stages\[1\].learning_rate=0.5 is not read.*'stage'"),
        (RunConfig(data=DataConfig(mixture_weights=(1.0, 2.0))), "data.mixture_weights has 2 entries for 1 sources"),
        (RunConfig(data=DataConfig(mixture_weights=(0.0,))), "at least one weight must be positive"),
        (
            RunConfig(data=DataConfig(sources=("a", "b"), mixture_weights=(1.0, -0.5))),
            r"data.mixture_weights\[1\]=-0.5 must not be negative",
        ),
        (
            RunConfig(stages=(StageConfig(mixture_weights=(0.0, 0.0)),), data=DataConfig(sources=("a", "b"))),
            r"stages\[0\].mixture_weights=\(0.0, 0.0\): at least one weight must be positive",
        ),
    ],
)
def test_rules_between_fields_are_checked_once(config, words):
    with pytest.raises(ConfigError, match=words):
        validate(config)


def test_width_growth_scales_the_epsilon_of_later_stages():
    stages = (StageConfig(name="a"), StageConfig(name="b", embed_dim=256), StageConfig(name="c", num_layers=9))
    models = RunConfig(stages=stages).stage_models
    assert [m.norm_eps for m in models] == [1e-5, 0.5e-5, 0.5e-5]
    assert [m.num_layers for m in models] == [4, 4, 9]
    assert [m.embed_dim for m in models] == [128, 256, 256]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "nowhere"),
        (lambda folder: folder.mkdir(), "nowhere"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_bytes(b"good" * 20 + b"\xff")), "byte 80"),
        (
            lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("short"), (folder / "b.txt").write_text("x")),
            "",
        ),
    ],
    ids=["missing", "empty", "not_utf8", "too_short"],
)
def test_bad_text_is_named_before_anything_is_trained(capsys, tmp_path, make, words):
    make(tmp_path / "nowhere")
    workdir = tmp_path / "run"
    flags = (f"--config.data.sources={tmp_path / 'nowhere'}", "--config.data.vocabulary=bytes")
    assert cli.main(["train", QUICKSTART, *flags, f"--workdir={workdir}"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("flmjax: ")
    assert words in err
    assert not (workdir / "checkpoints").exists() or not list((workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(("command", "resumes"), [("train", True), ("plan", False)])
def test_an_interrupted_command_says_whether_it_resumes(command, resumes, monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, interrupted)
    workdir = [f"--workdir={tmp_path}"] if command == "train" else []
    assert cli.main([command, QUICKSTART, *workdir]) == 130
    error = capsys.readouterr().err
    assert error.startswith("flmjax: interrupted")
    assert ("run the same command again to go on" in error) == resumes


# ---- help ------------------------------------------------------------------------------------------------------------


def screen(capsys, *argv: str) -> list[str]:
    """The lines that a command prints; it exits with 0 and prints no error."""
    assert cli.main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"], ["help", "--help"]], ids=" ".join)
def test_help_is_one_screen_that_names_the_commands(argv, capsys):
    lines = screen(capsys, *argv)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "flmjax/config/run.py" in text
    assert EXAMPLES["train"][0] in text
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in text
        assert command.__doc__ in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_is_one_screen_with_its_flags(name, capsys):
    lines = screen(capsys, name, "--help")
    assert lines == screen(capsys, "help", name) == screen(capsys, name, "-h")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for option in parsing.OPTIONS[name]:
        assert f"  {option.flag} " in text
        assert option.help in text
    flags = text.split("Flags:")[1]
    assert ("--config=" in flags) == (name != "report")
    assert ("--workdir=" in flags) == (name != "plan")
    for example in EXAMPLES[name]:
        assert example in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_the_help_parse(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    for example in EXAMPLES[name]:
        program, *argv = shlex.split(example)
        assert program == "flmjax"
        cli.parse(argv)
    assert argv[0] == name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_in_the_help_are_flags_that_set_them(path, capsys, tmp_path):
    """The printed lines, pasted, turn the default config with as many stages into the config of the file."""
    lines = screen(capsys, "train", f"--config={path}", "--config.seed=3", "--help")
    lines = lines[lines.index("Settings of this config:") + 1 :]
    assert any(line.startswith("--config.model.norm=") and line.endswith("  # layernorm | rmsnorm") for line in lines)
    assert any(line.startswith("--config.model.max_length=") and line.endswith("  # tokens") for line in lines)
    assert any(
        line.startswith("--config.data.vocab_size=") and "# Number of pieces to train;" in line for line in lines
    )
    flags = shlex.split("\n".join(lines), comments=True)
    assert "--config.seed=3" in flags
    assert any(flag.startswith("--config.stages[0].steps=") for flag in flags)
    config = cli.parse(["train", f"--config={path}", "--config.seed=3", "--workdir=w"]).config
    assert flags == [flag for flag, _ in settings(config)]
    default = tmp_path / "default.py"
    run = f"RunConfig(stages=(StageConfig(),) * {len(config.stages)})"
    default.write_text(f"from flmjax.config import *\ndef get_config():\n    return to_config_dict({run})\n")
    assert cli.parse(["train", f"--config={default}", *flags, "--workdir=w"]).config == config


def test_the_version_is_printed(capsys):
    assert screen(capsys, "--version") == [f"flmjax {flmjax.__version__}"]


def test_help_does_not_import_jax():
    argvs = [[], ["--version"], ["train", "--help"], ["help", "plan"], ["train", QUICKSTART, "--help"]]
    argvs += [
        ["train", QUICKSTART + ":x"],
        ["train", QUICKSTART, "--config.seed=-1", "--workdir=w"],
        ["train", "--workdir=w"],
    ]
    code = f"import sys; from flmjax.cli import main; [main(a) for a in {argvs}]; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)
