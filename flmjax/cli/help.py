"""One screen of help: of the program, of each command, and the settings of a config as the flags that set them."""

import dataclasses
import inspect
import re
import shlex
import typing
from collections.abc import Iterator
from typing import Any

import flmjax
from flmjax.cli.commands import COMMANDS
from flmjax.cli.parsing import (
    CONFIG,
    FILE_FLAGS,
    OPTIONS,
    OVERRIDE,
    WORKDIR,
    check_command,
    continues,
    read_config,
    read_flags,
    split_kind,
    takes_config,
    takes_workdir,
)
from flmjax.config import RunConfig
from flmjax.config.validate import constraints
from flmjax.config.values import Range
from flmjax.launch.launch_file import KINDS

HELP_FLAGS = ("--help", "-help", "-h")
SETTINGS = "Settings stand in flmjax/config/run.py and fields.py; with --config=FILE this help prints a file's."
# Commands to paste in the root of a checkout; a command that reads a run stands after the one that writes it.
EXAMPLES = {
    "train": ("flmjax train --config=configs/quickstart.py --workdir=runs/quickstart",),
    "prepare": ("flmjax prepare --config=configs/quickstart.py --workdir=runs/quickstart --inspect=3",),
    "grow": (
        "flmjax train --config=configs/flm_101b.py:cpu,16b --workdir=runs/small",
        "flmjax grow --config=configs/flm_101b.py:cpu,51b --source=runs/small --workdir=runs/large",
    ),
    "plan": ("flmjax plan --config=configs/flm_101b.py:a800 --cost-only",),
    "report": (
        "flmjax train --config=configs/quickstart.py --workdir=runs/quickstart",
        "flmjax report --workdir=runs/quickstart",
    ),
    "launch": ("flmjax launch slurm --config=configs/flm_101b.py:a800 --workdir=/shared/flm --output=flm.sbatch",),
}


def wants_help(argv: list[str]) -> bool:
    """Whether a command line asks for help: no argument, `help`, or --help anywhere."""
    return not argv or argv[0] == "help" or any(argument in HELP_FLAGS for argument in argv)


def help_text(argv: list[str]) -> str:
    """The help that `argv` asks for.

    Raises:
        ConfigError or absl.flags.Error: for an unknown command, or a config that cannot be read.
    """
    words = [argument for argument in argv if argument not in HELP_FLAGS]
    if words[:1] == ["help"]:
        words = words[1:]
    if not words:
        return _overview()
    command = check_command(words[0])
    text = _command_help(command)
    if takes_config(command):
        config = read_config(command, read_flags(command, split_kind(command, words[1:])[1]))
        if config is not None:
            lines = (shlex.quote(flag) + (f"  # {comment}" if comment else "") for flag, comment in settings(config))
            text += "\n\nSettings of this config:\n" + "\n".join(lines)
    return text


def version_text() -> str:
    """The line that --version prints."""
    return f"flmjax {flmjax.__version__}"


def settings(config: Any, path: str = "config") -> Iterator[tuple[str, str]]:
    """(flag, comment) for each field of a config: `--config.stages[0].steps=240`, and the words of a choice.

    The comment has in addition the field's comment in flmjax/config.
    """
    hints, comments = typing.get_type_hints(type(config)), _comments(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from settings(value, name)
        elif isinstance(config, RunConfig) and field.name == "stages":
            for i, stage in enumerate(value):
                yield from settings(stage, f"{name}[{i}]")
        else:
            words = [" | ".join(x) for x in constraints(hints[field.name]) if not isinstance(x, Range)]
            yield f"--{name}={value}", "; ".join(filter(None, [*words, comments[field.name]]))


def _comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass: the lines of comment above it, and that at the end of its line."""
    comments, above = {}, []
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"    # (.*)", line):
            above.append(match[1])
            continue
        if match := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            comments[match[1]] = " ".join(filter(None, [*above, match[2]]))
        above = []
    return comments


def _overview() -> str:
    lines = [
        f"{version_text()}: pre-train decoder language models by growing them",
        "",
        f"usage: flmjax COMMAND {FILE_FLAGS} {WORKDIR.flag}",
        "",
        "Commands:",
        *(f"  {name:9}{_first_line(name)}" for name in COMMANDS),
        "",
        "Example, three stages of growth in minutes on a CPU:",
        f"  {EXAMPLES['train'][0]}",
        "",
        "Help:",
        "  flmjax COMMAND --help                 an example and the flags of a command",
        "  flmjax COMMAND --config=FILE --help   in addition all settings of the config, with their values",
        "  flmjax --version                      the version",
        "",
        "All settings stand in flmjax/config/run.py and fields.py; each of them is a flag.",
    ]
    return "\n".join(lines)


def _command_help(command: str) -> str:
    options = list(OPTIONS[command])
    if takes_workdir(command):
        options.insert(0, WORKDIR)
    if takes_config(command):
        options[:0] = [CONFIG, OVERRIDE]
    width = max(len(option.flag) for option in options)
    lines = [
        f"flmjax {command}: {_first_line(command)}",
        "",
        "Example:",
        *(f"  {example}" for example in EXAMPLES[command]),
        "",
        "Flags:",
        *(f"  {option.flag:{width}}  {option.help}" for option in options),
        *(["", SETTINGS] if takes_config(command) else []),
        *(["The workdir of an existing run needs no --config."] if continues(command) else []),
        *([f"KIND is one of {', '.join(KINDS)}."] if command == "launch" else []),
    ]
    return "\n".join(lines)


def _first_line(command: str) -> str:
    return (COMMANDS[command].__doc__ or "").splitlines()[0]
