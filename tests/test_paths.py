"""Paths on the command line that cannot be: one line that names the flag or the setting, and nothing is written."""

from pathlib import Path

import pytest

import flmjax
from flmjax import cli
from flmjax.config import ConfigError
from flmjax.workdir.metrics import read_metrics
from flmjax.workdir.paths import begin_growth, stored_config

QUICKSTART = f"--config={Path(__file__).parents[1] / 'configs' / 'quickstart.py'}"
LONG = "x" * 300  # a file's name has 255 bytes at most
COMMANDS = {
    "config": ["train", "--config=PATH.py", "--workdir=w"],
    "config with words": ["train", "--config=PATH.py:small", "--workdir=w"],
    "workdir": ["train", QUICKSTART, "--workdir=PATH"],
    "workdir alone": ["train", "--workdir=PATH/below"],
    "workdir of prepare": ["prepare", QUICKSTART, "--workdir=PATH"],
    "source": ["grow", "--source=PATH", "--workdir=w"],
    "dry run": ["grow", "--source=PATH", "--dry-run"],
    "workdir of report": ["report", "--workdir=PATH"],
    "second workdir of report": ["report", "--workdir=w", "--workdir=PATH"],
    "output of report": ["report", "--workdir=w", "--output=PATH"],
    "output of plan": ["plan", QUICKSTART, "--cost-only", "--output=PATH"],
    "help": ["train", "--config=PATH.py", "--help"],
}
DATA = ("prepare", QUICKSTART, "--workdir=w")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the command lines run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complain(capsys, *argv: str) -> str:
    """The one line that a refused command prints; the folder is left as it was."""
    before = sorted(Path().rglob("*"))
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert len(err) < 500
    assert sorted(Path().rglob("*")) == before
    return err


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_a_name_that_is_too_long_is_blamed_on_its_flag(argv, capsys):
    error = complain(capsys, *(argument.replace("PATH", LONG) for argument in argv))
    assert "xxxxx" in error
    assert "File name too long" in error
    assert "standard output" not in error


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_the_home_folder_of_no_user_is_refused(argv, capsys):
    error = complain(capsys, *(argument.replace("PATH", "~nobody_of_that_name/x") for argument in argv))
    flag = next(argument for argument in argv if "PATH" in argument).partition("=")[0]
    assert f"{flag}=~nobody_of_that_name/x" in error
    assert "there is no user nobody_of_that_name; a folder of that name is ./~nobody_of_that_name" in error


@pytest.mark.parametrize("name", ["directory", "vocabulary"])
def test_a_setting_below_the_home_folder_of_no_user_is_refused(name, capsys):
    error = complain(capsys, *DATA, f"--config.data.{name}=~nobody_of_that_name/x.model")
    assert f"data.{name}=~nobody_of_that_name/x.model: there is no user nobody_of_that_name" in error


@pytest.mark.parametrize("read", [flmjax.load, read_metrics], ids=["load", "read_metrics"])
def test_functions_refuse_the_home_folder_of_no_user(read):
    with pytest.raises(ConfigError, match="there is no user nobody_of_that_name"):
        read("~nobody_of_that_name/x")


def test_a_folder_with_a_tilde_in_its_name_is_a_folder(folder):
    assert cli.parse(["train", QUICKSTART, "--workdir=./~nobody_of_that_name"]).workdir == Path("~nobody_of_that_name")
    assert cli.parse(["train", QUICKSTART, "--workdir=a/~b"]).workdir == Path("a/~b")


@pytest.mark.parametrize("path", ["/", "//", "/."])
def test_the_root_folder_is_refused_as_the_folder_of_the_data(path, capsys):
    error = complain(capsys, *DATA, f"--config.data.directory={path}")
    assert f"data.directory={path} is the root of the file system; name a folder in it" in error


def test_a_path_with_the_character_nul_is_refused(capsys, folder):
    for name in ("directory", "vocabulary"):
        body = f"return RunConfig(data=DataConfig({name}='a\\0.model'))"
        Path("nul.py").write_text(f"from flmjax.config import *\ndef get_config():\n    {body}\n")
        error = complain(capsys, "prepare", "--config=nul.py", "--workdir=w")
        assert f"data.{name}=a\\x00.model': a path cannot have the character NUL" in error


@pytest.mark.parametrize("argv", [a for name, a in COMMANDS.items() if "config" not in name and name != "help"])
def test_a_link_to_nothing_is_no_folder(argv, capsys):
    Path("link").symlink_to("gone")
    Path("loop").symlink_to("loop")
    for path, target in (("link", "gone"), ("link/below", "gone"), ("loop", "loop")):
        error = complain(capsys, *(argument.replace("PATH", path) for argument in argv))
        assert f"{path.partition('/')[0]} is a link to {target}, which does not exist; create that folder" in error


def test_advice_after_a_growth_that_was_cut_off_can_be_pasted():
    begin_growth(Path("my runs/b"), Path("my runs/a"))
    with pytest.raises(ConfigError, match=r"again: flmjax grow --source='my runs/a' --workdir='my runs/b'$"):
        stored_config(Path("my runs/b"))


@pytest.mark.parametrize("path", ["/", ".", ":small"])
def test_a_config_that_is_a_folder_is_no_config_file(path, capsys):
    assert f"there is no config file '{path.partition(':')[0]}'" in complain(
        capsys, "train", f"--config={path}", "--workdir=w"
    )


def test_a_flag_file_that_is_no_text_is_named(capsys, folder):
    Path("flags").write_bytes(b"--workdir=\xff\n")
    for path in ("flags", "gone", ".", LONG):
        error = complain(capsys, "train", QUICKSTART, f"--flagfile={path}")
        assert path[:50] in error
