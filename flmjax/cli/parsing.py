"""Flags of every command, and from a list of arguments to a checked config."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from flmjax.cli.commands import COMMANDS
from flmjax.config import ConfigError, RunConfig, check_path, from_config_dict, nearest, to_config_dict
from flmjax.config.validate import validate


class Option(NamedTuple):
    """A flag of a command.

    Attributes:
        name: the flag without its dashes.
        value: placeholder of the flag's value in the help; None for a switch.
        help: one line, a noun phrase or a statement.
        type: of the value.
    """

    name: str
    value: str | None
    help: str
    type: type = str

    @property
    def flag(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name}" + ("" if self.value is None else f"={self.value}")

    def define(self, values: flags.FlagValues) -> flags.FlagHolder[Any]:
        """Add the flag to `values`."""
        if self.value is None:
            return flags.DEFINE_boolean(self.name, False, self.help, flag_values=values)
        if self.type is int:
            return flags.DEFINE_integer(self.name, 0, self.help, lower_bound=0, flag_values=values)
        if self.type is float:
            return flags.DEFINE_float(self.name, None, self.help, lower_bound=0.0, flag_values=values)
        return flags.DEFINE_string(self.name, None, self.help, flag_values=values)


CONFIG = Option("config", "FILE[:WORDS]", "configuration file; its docstring lists the words of its argument")
OVERRIDE = Option("config.FIELD", "VALUE", "one setting in place of the file's, e.g. '--config.stages[0].steps=50'")
WORKDIR = Option("workdir", "DIR", "folder of the run: config, metrics, checkpoints, certificates, report")
USAGE = f"usage: flmjax COMMAND {CONFIG.flag} [{OVERRIDE.flag} ...] {WORKDIR.flag}"
USAGE_GROW = "usage: flmjax grow [--config=FILE] --source=WORKDIR (--workdir=DIR [--weights-only] | --dry-run)"
# The flags of each command beside --config and --workdir.
OPTIONS: dict[str, tuple[Option, ...]] = {
    "train": (),
    "prepare": (Option("inspect", "N", "print N samples of the training data as text", int),),
    "grow": (
        Option("source", "WORKDIR", "workdir of the run to grow; its newest checkpoint is read"),
        Option("dry-run", None, "print the growth rule of every parameter and write nothing"),
        Option("weights-only", None, "start the optimizer afresh instead of growing Adam's moments"),
    ),
    "plan": (
        Option("output", "DIR", "folder for plan.json and plan.html"),
        Option("price", "DOLLARS", "price of one device for an hour", float),
        Option("search-layout", None, "search mesh, microbatches and remat; the best estimates are compiled"),
        Option("cost-only", None, "compile nothing: FLOPs, days and price by arithmetic alone"),
        Option("tflops", "N", "with --cost-only: model TFLOP/s of one device", float),
    ),
    "report": (),
}


def takes_config(command: str) -> bool:
    """Whether a command reads a config file; report reads the config of the workdir."""
    return command != "report"


def takes_workdir(command: str) -> bool:
    """Whether a command writes or reads a workdir; plan does not."""
    return command != "plan"


class CommandLine(NamedTuple):
    """A command line that was understood.

    Attributes:
        command: a name of COMMANDS.
        config, workdir: None where the command takes none.
        options: the values of the command's OPTIONS, by name.
    """

    command: str
    config: RunConfig | None
    workdir: Path | None
    options: dict[str, Any]


def parse(argv: list[str]) -> CommandLine:
    """The command line `argv`, without the program's name.

    Raises:
        ConfigError or absl.flags.Error: for anything that is not understood, with the nearest names.
    """
    command = check_command(argv[0])
    base = _source_config(command, argv[1:])
    values, options = read_flags(command, argv[1:], base)
    if command == "grow" and not options["source"]:
        raise ConfigError(f"--source is missing: the workdir of the run to grow; {USAGE_GROW}")
    if not values["workdir"].value and not options.get("dry_run") and takes_workdir(command):
        raise ConfigError(f"--workdir is missing; {USAGE}")
    workdir = Path(values["workdir"].value or "") if takes_workdir(command) else None
    if not takes_config(command):
        return CommandLine(command, None, workdir, options)
    config = read_config(values)
    if config is None:
        raise ConfigError(f"--config is missing; {USAGE}")
    if base is not None:
        from flmjax.training.grow_config import grown_config

        config = grown_config(config, base)
    return CommandLine(command, validate(config), workdir, options)


def check_command(word: str) -> str:
    """The name of a command.

    Raises:
        ConfigError: for another word, with the nearest names.
    """
    if word not in COMMANDS:
        raise ConfigError(f"unknown command '{word}'{nearest(word, COMMANDS)}")
    return word


def _source_config(command: str, arguments: list[str]) -> RunConfig | None:
    """The config that flags change if `grow` has none: that of the source, the run to grow."""
    if command != "grow" or any(re.fullmatch(r"--?config(=.*)?", argument) for argument in arguments):
        return None
    values = flags.FlagValues()
    source = next(option for option in OPTIONS[command] if option.name == "source").define(values)
    values(["flmjax", *arguments], known_only=True)
    if not source.value:
        return None
    from flmjax.training.grow_config import source_config

    return source_config(Path(source.value))


def read_flags(
    command: str, arguments: list[str], base: RunConfig | None = None
) -> tuple[flags.FlagValues, dict[str, Any]]:
    """(all flags of a command line, the values of the command's OPTIONS by name).

    Raises:
        ConfigError or absl.flags.Error: for a flag, a field or a value that is not understood.
    """
    values = flags.FlagValues()
    # Expanded first: ml_collections looks for overrides among the arguments.
    arguments = values.read_flags_from_files(arguments, force_gnu=False)
    WORKDIR.define(values)
    if takes_config(command):
        _define_config(values, arguments, base)
    holders = {option.name.replace("-", "_"): option.define(values) for option in OPTIONS[command]}
    try:
        rest = values(["flmjax", *arguments])
    except IndexError:
        indexed = " ".join(a for a in arguments if re.match(r"--?config\.[^=]*\[", a))
        raise ConfigError(f"there is no such entry: {indexed}") from None
    except (AttributeError, KeyError, TypeError, NameError, SyntaxError) as error:  # from a config file
        raise ConfigError(f"the config file cannot be read: {type(error).__name__}: {one_line(error)}") from error
    if len(rest) > 1:
        raise ConfigError(f"'{rest[1]}' is not a flag; {USAGE}")
    return values, {name: holder.value for name, holder in holders.items()}


def read_config(values: flags.FlagValues) -> RunConfig | None:
    """The config with its overrides, rules between fields not yet checked; None without --config.

    Raises:
        ConfigError: for a file that does not exist, an unknown field or a value of another type.
    """
    flag = values["config"]
    if flag.value is None:
        return None
    try:
        tree = dict(flag.value)
    except OSError:  # raised at the first use of a file that could not be loaded
        raise ConfigError(f"there is no config file '{flag.config_filename}'") from None  # type: ignore[attr-defined]
    config: RunConfig = from_config_dict(tree)
    return config


def _define_config(values: flags.FlagValues, arguments: list[str], base: RunConfig | None) -> None:
    """Add --config, or overrides of `base`; overrides of unknown fields are refused before a file is read."""
    for argument in arguments:
        if override := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            check_path(override[1])
    if base is not None:
        argv = ["flmjax", *arguments]
        config_flags.DEFINE_config_dict(CONFIG.name, to_config_dict(base), flag_values=values, sys_argv=argv)
        return
    config_flags.DEFINE_config_file(
        CONFIG.name, help_string=CONFIG.help, flag_values=values, sys_argv=["flmjax", *arguments]
    )


def one_line(error: BaseException) -> str:
    """The message of an error; the last line of a config file's traceback, which the flag quotes completely."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = f"{text.splitlines()[0].split(': ')[0]}: {text.strip().splitlines()[-1].split(': ', 1)[-1]}"
    # A locked ConfigDict lists all its fields before the one that was meant.
    text = re.sub(r" and cannot be added.*(?=Did you mean)", "; ", text.replace("\\n", " "), flags=re.DOTALL)
    return " ".join(text.split())
