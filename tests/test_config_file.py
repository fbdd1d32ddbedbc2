"""Config files of one's own: what they may return, and every failure in them as one line with its place."""

import json
from pathlib import Path

import pytest

from flmjax import cli
from flmjax.config import ConfigError, DataConfig, RunConfig, StageConfig, to_json, to_stored

HEAD = "from flmjax.config import *\n"


def load(file: Path, *flags: str, words: str = "") -> RunConfig:
    """The config of a file, as the command line reads it."""
    return cli.parse(["train", f"--config={file}{words}", "--workdir=w", *flags]).config


def refusal(file: Path, *flags: str, words: str = "") -> str:
    """The one line that refuses a config file."""
    with pytest.raises(ConfigError) as refused:
        load(file, *flags, words=words)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture
def write(tmp_path):
    """A function that writes the body of get_config, or a file, and returns its path."""

    def write(body: str, *, is_file: bool = False) -> Path:
        file = tmp_path / "mine.py"
        file.write_text(body if is_file else f"{HEAD}def get_config():\n    {body}\n", encoding="utf-8")
        return file

    return write


RETURNS = {
    "dataclass": "return RunConfig(seed=3, stages=[StageConfig(name='a'), StageConfig(name='b')])",
    "config_dict": "return to_config_dict(RunConfig(seed=3, stages=(StageConfig(name='a'), StageConfig(name='b'))))",
    "dictionary": "return {'seed': 3, 'stages': [{'name': 'a'}, StageConfig(name='b')]}",
}


@pytest.mark.parametrize("body", RETURNS.values(), ids=RETURNS)
def test_a_file_returns_a_run_config_or_its_fields(body, write):
    config = load(write(body), "--config.stages[1].steps=7", "--config.model.num_layers=2")
    assert isinstance(config, RunConfig)
    assert (config.seed, config.model.num_layers) == (3, 2)
    assert [(stage.name, stage.steps) for stage in config.stages] == [("a", 100), ("b", 7)]


def test_lists_stand_for_tuples():
    data = DataConfig(sources=["a", "b"], mixture_weights=[1, 2])
    config = RunConfig(stages=[StageConfig(mixture_weights=[2, 1])], data=data)
    assert isinstance(hash(config), int)
    assert config.data == DataConfig(sources=("a", "b"), mixture_weights=(1.0, 2.0))
    assert config.stages[0].mixture_weights == (2, 1)
    assert DataConfig(sources="my/folder").sources == ("my/folder",)


def test_lists_are_assigned_to_the_tuples_of_a_config_dict(write):
    body = "config = to_config_dict(RunConfig())\n    config.data.sources = ['a', 'b']\n    return config"
    assert load(write(body)).data.sources == ("a", "b")


FAILURES = {
    "RunConfig(sede=1)": "RunConfig has no field 'sede'; did you mean seed",
    "GrowthConfig(learning_rate='rewarm')": "GrowthConfig has no field 'learning_rate'; it is called rate_policy now",
    "DataConfig(weights=(1, 2))": "DataConfig has no field 'weights'; it is called mixture_weights now",
    "OptimizerConfig(max_nonfinite_updates=3)": "it is called max_skipped_updates now",
    "RunConfig().modle": "RunConfig has no field 'modle'; did you mean model",
    "to_config_dict(RunConfig()).modle": "the config has no field 'modle'; did you mean model",
    "to_config_dict(RunConfig())['modle']": "the config has no field 'modle'; did you mean model",
    "to_config_dict(RunConfig()).update({'modle': 3})": "the config has no field 'modle'; did you mean model",
    "setattr(to_config_dict(RunConfig()).data, 'weights', 3)": "it is called mixture_weights now",
    "to_config_dict(RunConfig()).data.update(sources=3)": "the field 'sources' takes a value of type tuple, not int",
    "setattr(to_config_dict(RunConfig()), 'model', ModelConfig())": "'model' takes a value of type ConfigDict, not Mod",
    "1 / 0": "ZeroDivisionError: division by zero",
    "open('/nowhere/x.txt')": "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/x.txt'",
    "{}['x']": "KeyError: 'x'",
    "raise SystemExit(3)": "SystemExit: 3",
    "raise ValueError('one\\ntwo\\n\\nthree')": "ValueError: one two three",
    "assert False": "AssertionError",
    "import nowhere_to_be_found": "No module named 'nowhere_to_be_found'",
    "from flmjax.config import RunConifg": "did you mean RunConfig",
    "(lambda: [][1])()": "IndexError: list index out of range",
    "json.loads('{')": "NameError: name 'json' is not defined",
    "__import__('json').loads('{')": "JSONDecodeError: Expecting property name",
}


@pytest.mark.parametrize("statement", FAILURES)
def test_a_failure_in_a_file_is_told_with_its_line(statement, write):
    file = write(f"x = 1\n    {statement}\n    return RunConfig()")
    message = refusal(file)
    assert message.startswith(f"{file}:4: ")
    assert FAILURES[statement] in message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"{HEAD}def get_config():\n    RunConfig()\n", 2, "get_config returns None"),
        (f"{HEAD}def get_config():\n    return 3\n", 2, "must return a RunConfig, not 3"),
        (f"{HEAD}def get_config():\n    return [RunConfig()] * 99\n", 2, "must return a RunConfig, not [RunConfig("),
        (f"{HEAD}def get_config():\n    return {{'sede': 1}}\n", 2, "config has no field 'sede'; did you mean seed"),
        (f"{HEAD}def get_config():\n    return RunConfig(seed='1')\n", 2, "config.seed must be of type int, not '1'"),
        (f"{HEAD}def get_config():\n    return RunConfig(model=3)\n", 2, "config.model must be a ModelConfig"),
        (f"{HEAD}def get_config():\n    return RunConfig(stages=[3])\n", 2, "config.stages[0] must be a StageConfig"),
        (
            f"{HEAD}def get_config():\n    return RunConfig(seed=[10**5000])\n",
            2,
            "config.seed must be of type int, not a value",
        ),
        (f"{HEAD}def get_config(a, b):\n    return RunConfig()\n", 2, "get_config needs an argument"),
        (f"{HEAD}config = RunConfig()\n", None, "there is no function get_config"),
        (f"{HEAD}get_config = RunConfig()\n", None, "there is no function get_config"),
        ("", None, "there is no function get_config"),
        ("\n\ndef get_config(:\n", 3, "SyntaxError"),
        ("x = (\n", 1, "SyntaxError: '(' was never closed"),
        ("\n1 / 0\n", 2, "ZeroDivisionError"),
        ("x = 'a\\0'\nx = '\0'", None, "null bytes"),
        ("def get_config():\n    return get_config()", 2, "RecursionError"),
    ],
)
def test_a_file_that_gives_no_config_is_refused(text, line, words, write):
    file = write(text, is_file=True)
    message = refusal(file)
    assert message.startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert words in message


def test_words_are_handed_to_get_config_alone(write):
    file = write("return RunConfig()")
    assert "get_config takes no argument, but --config has ':small'" in refusal(file, words=":small")
    file = write(f"{HEAD}def get_config(size='3'):\n    return RunConfig(seed=int(size))", is_file=True)
    assert [load(file).seed, load(file, words=":5").seed] == [3, 5]


def test_a_neighbour_of_a_file_can_be_imported(write, tmp_path, monkeypatch):
    """An error in it is told at its own place."""
    neighbour = tmp_path / "sizes_of_mine.py"
    neighbour.write_text("SEED = 9\n")
    file = write("import sizes_of_mine\n    return RunConfig(seed=sizes_of_mine.SEED)")
    monkeypatch.chdir(tmp_path.parent)
    assert load(file).seed == 9
    for name, text, place in (("a", "x = 1\nx = (", "a_of_mine.py:2"), ("b", "\n1 / 0", "b_of_mine.py:2")):
        (tmp_path / f"{name}_of_mine.py").write_text(text)
        assert f"{tmp_path / place}: " in refusal(write(f"import {name}_of_mine"))


def test_an_error_in_a_function_of_a_neighbour_is_told_there(write, tmp_path):
    """Not one in the library, which the neighbour calls."""
    (tmp_path / "calls_of_mine.py").write_text(f"{HEAD}def seed():\n    return RunConfig(sede=1)\n")
    file = write("import calls_of_mine\n    return RunConfig(seed=calls_of_mine.seed())")
    assert refusal(file) == f"{tmp_path / 'calls_of_mine.py'}:3: RunConfig has no field 'sede'; did you mean seed?"


def test_a_file_that_changed_within_a_second_is_read_again(write):
    """No compiled copy is kept beside the file either."""
    assert [load(write(f"return RunConfig(seed={seed})")).seed for seed in (1, 2)] == [1, 2]
    assert not list(write("").parent.rglob("__pycache__"))


def test_a_schedule_of_a_stage_that_continues_one_is_refused(write):
    """Also when a setting equals the default, which would be ignored in silence."""
    for field in ("learning_rate=1e-3", "final_learning_rate=0.0", "warmup_steps=0", "schedule='cosine'"):
        file = write(f"return RunConfig(stages=[StageConfig(), StageConfig(name='b', {field})])")
        assert f"stages[1].{field.split('=')[0]}=" in refusal(file)
        assert load(file, "--config.stages[1].growth.rate_policy=stage").stages[1].name == "b"
        assert load(file, f"--config.stages[1].{field.split('=')[0]}=None").stages[1].name == "b"


# ---- a workdir in place of a file ------------------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path):
    """A workdir with a config.json alone."""
    path = tmp_path / "run"
    path.mkdir()
    config = RunConfig(seed=5, stages=(StageConfig(), StageConfig(name="b")))
    (path / "config.json").write_text(json.dumps(to_stored(config)))
    return path


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_an_existing_workdir_needs_no_config_file(command, workdir):
    config = cli.parse([command, f"--workdir={workdir}", "--config.stages[1].steps=9"]).config
    assert (config.seed, config.stages[1].steps) == (5, 9)


def test_a_workdir_without_a_run_needs_a_config_file(capsys, tmp_path):
    for flag in ("--config.seed=3", "--config="):
        assert cli.main(["train", f"--workdir={tmp_path}", flag]) == 2
        assert f"--config is missing; {tmp_path} holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("number", ['"2"', "true", "2.0", "null", "[2]", "3"])
def test_a_format_that_is_no_known_number_is_one_line(number, workdir, capsys):
    stored = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**stored, "format": json.loads(number)}))
    assert cli.main(["train", f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{workdir / 'config.json'}" in error
    assert number in error


def test_a_stored_schedule_default_is_no_setting(workdir):
    """Older versions wrote the schedule's numbers for every stage, read or not."""
    numbers = {"learning_rate": 1e-3, "final_learning_rate": 0.0, "warmup_steps": 0, "decay_fraction": 0.2}
    config = to_json(RunConfig(seed=5, stages=(StageConfig(), StageConfig(name="b"))))
    for stage in config["stages"]:
        stage |= {**numbers, "schedule": "cosine"}
    path = workdir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": config}))
    read = cli.parse(["train", f"--workdir={workdir}"]).config
    assert read.stages[1] == StageConfig(name="b")
