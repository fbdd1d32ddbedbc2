"""The README's blocks: every command parses, what is cheap runs, the Python runs, and every file it names exists."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from quick_xla import QUICK_XLA

import flmjax
from flmjax import cli
from flmjax.config import ConfigError, RunConfig
from flmjax.workdir.paths import write_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
FLMJAX = [command for command in COMMANDS if command.startswith("flmjax ")]
# What `flmjax grow` makes of the quickstart's last model, as a reader's big.py has it.
BIG = """
from flmjax.config import DataConfig, ModelConfig, RunConfig, StageConfig, to_config_dict

def get_config():
    model = ModelConfig(
        num_layers=5, embed_dim=192, num_heads=6, head_dim=32, mlp_dim=1024, max_length=128, activation="gelu_tanh",
        norm_eps=1e-5 * 128 / 192,
    )
    data = DataConfig(sources=("my/folder",), vocabulary="bytes")
    return to_config_dict(RunConfig(model=model, stages=(StageConfig(steps=2, batch_size=16),), data=data))
"""
(MINE,) = [block for kind, block in BLOCKS if kind == "python" and "def get_config" in block]  # a reader's mine.py
# Flags that make the quickstart small enough for a test.
SMALL = (
    *(f"--config.stages[{i}].{field}" for i in range(3) for field in ("steps=2", "warmup_steps=1")),
    "--config.data.vocabulary=bytes",
    "--config.evaluation_rows=8",
    "--config.sample_tokens=0",
    "--config.certificate_float64_below=0",
)


def arguments(command: str) -> list[str]:
    """The arguments of a line of a bash block, its comment left out."""
    return shlex.split(command, comments=True)[1:]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a reader: configs/, a big.py and some texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "big.py").write_text(BIG)
    (tmp_path / "mine.py").write_text(MINE)
    text = "".join(f"Sentence {i} of {i * i % 97} stands beside word {i % 7}.\n" for i in range(40))
    for name in ("my/folder", *(f"{parent}/{kind}" for parent in ("FOLDER", "texts") for kind in ("en", "zh"))):
        Path(name).mkdir(parents=True)
        for i in range(20):
            Path(name, f"{i}.txt").write_text(f"{name} {i}\n{text}")
    for kind in ("en_instructions", "zh_instructions"):
        Path("FOLDER", kind).mkdir()
        examples = ({"instruction": f"Add {i} to {i}.", "input": text, "output": str(2 * i)} for i in range(60))
        Path("FOLDER", kind, "a.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return tmp_path


def command_with(*words: str) -> str:
    """The one command of the README that has all `words`."""
    (command,) = [command for command in FLMJAX if all(word in command for word in words)]
    return command


@pytest.mark.parametrize("command", FLMJAX, ids=lambda command: command.split("#")[0].strip())
def test_commands_parse(command, folder):
    if "--help" in command:
        assert cli.main(arguments(command)) == 0
    elif "--config" not in command and "train" in command:
        with pytest.raises(ConfigError, match="runs/own holds no run"):
            cli.parse(arguments(command))
        write_config(RunConfig(seed=8), Path("runs/own"))
        assert cli.parse(arguments(command)).config == RunConfig(seed=8)
    elif "--config=" not in command and "grow" in command:  # of the source's config
        with pytest.raises(ConfigError, match="runs/mine is no workdir of a run: it has no complete checkpoint"):
            cli.parse(arguments(command))
    else:
        cli.parse(arguments(command))


def test_other_commands_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in set(COMMANDS) - set(FLMJAX):
        program, *rest = shlex.split(command, comments=True)
        if program == "pip":
            assert re.fullmatch(r"\.\[([\w-]+)\]", rest[-1])[1] in extras
        else:
            assert os.access(ROOT / program, os.X_OK), command


def test_files_and_extras_that_it_names_exist():
    names = re.findall(r"`((?:flmjax|configs|notebooks|launch|tests|\.github)/[\w./]+)`", README)
    names += [f"flmjax/{name}" for name in re.findall(r"`((?:config|model|growth|training)/\w+\.py)`", README)]
    names += re.findall(r"\]\((launch/[\w.]+)\)", README)
    assert len(names) >= 10
    assert [name for name in names if not (ROOT / name).exists()] == []
    for module in re.findall(r"`(flmjax(?:\.\w+)+)\.\w+`", README):
        assert importlib.util.find_spec(module), module
    (extras,) = re.findall(r"^\| install \| extras (.*?):", README, re.MULTILINE)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert re.findall(r"`([\w-]+)`", extras) == list(pyproject["project"]["optional-dependencies"])


def test_the_tree_lists_every_room():
    (tree,) = [block for kind, block in BLOCKS if kind == "text"]
    rooms = {path.name for path in (ROOT / "flmjax").iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert set(re.findall(r"^(\w+)/ ", tree, re.MULTILINE)) == rooms


def test_the_python_block_grows_a_model_exactly():
    (block,) = [block for kind, block in BLOCKS if kind == "python" and "grow_params(" in block]
    names: dict[str, jax.Array] = {}
    exec(block, names)
    assert names["difference"].shape == (1, 16, 4096)
    assert abs(names["difference"]).max() < 1e-5


def test_the_public_names_exist():
    (paragraph,) = re.findall(r"^These names stay: (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    assert callable(flmjax.load)
    listed = re.findall(r"((?:`\w+`(?:, | and )?)+)\s+of\s+`(flmjax[\w.]+)`", paragraph)
    assert len(listed) == 5
    for names, module in listed:
        for name in re.findall(r"\w+", names.replace(" and ", " ")):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_a_config_of_ones_own_trains_and_goes_on(folder, own_environment):
    """With small sizes and few steps; the second command has no --config."""
    assert len(MINE.splitlines()) <= 12
    train, resume = (arguments(command_with("--workdir=runs/own", word)) for word in ("mine.py", "# goes on"))
    sizes = ("model.embed_dim=32", "model.mlp_dim=48", "model.max_length=32", "stages[1].mlp_dim=64")
    batches = ("stages[0].batch_size=2", "stages[1].batch_size=2", "data.validation_fraction=0.2")
    small = [flag for flag in SMALL if "[2]" not in flag and "[1].warmup" not in flag]
    small += [f"--config.{setting}" for setting in (*sizes, *batches)]
    environment = own_environment | {"XLA_FLAGS": QUICK_XLA, "JAX_PLATFORMS": "cpu"}
    for argv in ([*train, *small], resume):
        command = [sys.executable, "-m", "flmjax", *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "report: runs/own/report.html" in done.stdout
    assert len(list(Path("runs/own/certificates").iterdir())) == 1


@pytest.mark.slow
def test_a_run_on_a_folder_is_reported_and_grown(folder, capsys):
    """The README's commands one after the other, on a small folder and with few steps."""
    assert cli.main([*arguments(command_with("sources=my/folder")), *SMALL]) == 0
    assert cli.main(arguments(command_with("flmjax report"))) == 0
    workdir = folder / "runs" / "mine"
    absent = {"parent.json", "profile/", "roll_backs.jsonl"}
    absent.add("compile_cache/")  # conftest.py has another folder of compiled programs
    for line in README.partition("## What a run leaves")[2].partition("##")[0].splitlines():
        for name in re.findall(r"`([\w./]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            assert (workdir / name.removesuffix("STEP/")).exists() != (name in absent), name
    (block,) = [block for kind, block in BLOCKS if kind == "python" and "flmjax.load(" in block]
    exec(block, names := {})
    assert names["logits"].shape[:2] == (1, len(names["ids"]))
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("6 ")]
    assert len(printed) > 2
    capsys.readouterr()
    assert cli.main(arguments(command_with("flmjax grow", "--dry-run"))) == 0
    assert "layers/mlp/up/kernel" in capsys.readouterr().out
    assert not (folder / "runs" / "big").exists()
    for name in ("big", "big2"):
        assert cli.main(arguments(command_with("flmjax grow", f"--workdir=runs/{name} "))) == 0
        assert "growth certificate" in capsys.readouterr().out
        assert list((folder / "runs" / name / "certificates").iterdir())
        assert (folder / "runs" / name / "parent.json").exists()


def test_the_cost_of_flm_101b_is_printed(folder, capsys):
    assert cli.main(arguments(command_with("--cost-only"))) == 0
    assert "101B" in capsys.readouterr().out


def test_a_folder_of_four_sources_is_prepared_and_inspected(folder, capsys):
    assert cli.main([*arguments(command_with("bilingual.py")), "--config.data.validation_fraction=0.1"]) == 0
    out = capsys.readouterr().out
    assert "FOLDER/zh_instructions" in out
    assert out.count("--- sample ") == 3
