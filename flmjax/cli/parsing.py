"""Flags of every command, and from a list of arguments to a checked config."""

import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from flmjax.cli.commands import COMMANDS
from flmjax.cli.config_file import load_config
from flmjax.config import ConfigError, RunConfig, field_type, nearest, override, parse_value, refuse_unread, shorten
from flmjax.config.validate import validate
from flmjax.config.values import local_path
from flmjax.launch.launch_file import KINDS, check_kind
from flmjax.workdir.paths import read_config as read_workdir_config
from flmjax.workdir.storage import connect, is_url, run_path


class Option(NamedTuple):
    """A flag of a command.

    Attributes:
        name: the flag without its dashes.
        value: placeholder of the flag's value in the help; None for a switch.
        help: one line, a noun phrase or a statement.
        type: of the value; range for START:STEPS.
        is_folder: whether the value is the path of a folder.
        is_repeated: whether the flag may stand several times; its value is a tuple.
    """

    name: str
    value: str | None
    help: str
    type: type = str
    is_folder: bool = False
    is_repeated: bool = False

    @property
    def flag(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name}" + ("" if self.value is None else f"={self.value}")

    def define(self, values: flags.FlagValues) -> flags.FlagHolder[Any]:
        """Add the flag to `values`."""
        if self.value is None:
            return flags.DEFINE_boolean(self.name, False, self.help, flag_values=values)
        if self.is_repeated:
            return flags.DEFINE_multi_string(self.name, [], self.help, flag_values=values)
        if self.type is int:
            return flags.DEFINE_integer(self.name, 0, self.help, lower_bound=0, flag_values=values)
        if self.type is float:
            return flags.DEFINE_float(self.name, None, self.help, lower_bound=0.0, flag_values=values)
        return flags.DEFINE_string(self.name, None, self.help, flag_values=values)


CONFIG = Option(
    "config",
    "FILE[:WORDS]",
    "configuration file; its docstring lists the words of its argument",
)
OVERRIDE = Option("config.FIELD", "VALUE", "one setting in place of the file's, e.g. '--config.stages[0].steps=50'")
WORKDIR = Option("workdir", "DIR", "folder of the run, or a gs:// or s3:// URL: config, metrics, checkpoints")
FILE_FLAGS = f"{CONFIG.flag} [{OVERRIDE.flag} ...]"
USAGES = {
    "train": f"{FILE_FLAGS} {WORKDIR.flag} [--profile=START:STEPS]",
    "prepare": f"{FILE_FLAGS} {WORKDIR.flag} [--inspect=N]",
    "grow": f"[{CONFIG.flag}] [{OVERRIDE.flag} ...] --source=WORKDIR ({WORKDIR.flag} [--weights-only] | --dry-run)",
    "plan": f"{FILE_FLAGS} [--output=DIR | --search-layout | --cost-only [--tflops=N]] [--price=DOLLARS] "
    "[--hours-between-failures=N]",
    "report": f"{WORKDIR.flag} [{WORKDIR.flag} ...] [--output=DIR]",
    "launch": f"KIND {FILE_FLAGS} {WORKDIR.flag} --output=FILE [--site=FILE]",
}
# The flags of each command beside --config and --workdir.
OPTIONS: dict[str, tuple[Option, ...]] = {
    "train": (Option("profile", "START:STEPS", "trace updates START + 1 to START + STEPS, for xprof", range),),
    "prepare": (Option("inspect", "N", "print N samples of the training data as text", int),),
    "grow": (
        Option("source", "WORKDIR", "workdir of the run to grow; its newest checkpoint is read", is_folder=True),
        Option("dry-run", None, "print the growth rule of every parameter and write nothing"),
        Option("weights-only", None, "start the optimizer afresh instead of growing Adam's moments"),
    ),
    "plan": (
        Option("output", "DIR", "folder for plan.json and plan.html", is_folder=True),
        Option("price", "DOLLARS", "price of a device-hour; default: 1 for A800s, none for other chips", float),
        Option("hours-between-failures", "N", "mean time between failures; default: one in 1,000 device-days", float),
        Option("search-layout", None, "search mesh, microbatches and remat; the best estimates are compiled"),
        Option("cost-only", None, "compile nothing: FLOPs, days and price by arithmetic alone"),
        Option("tflops", "N", "with --cost-only: model TFLOP/s of one device", float),
    ),
    "report": (
        WORKDIR._replace(help="folder of a run; several are compared on one page", is_folder=True, is_repeated=True),
        Option("output", "DIR", "folder of the page; default: the run's, of several ./comparison", is_folder=True),
    ),
    "launch": (
        WORKDIR._replace(help="folder of the run as every host sees it; of TPUs gs://BUCKET/FOLDER"),
        Option("output", "FILE", "the launch file; one that stands there is replaced"),
        Option("site", "FILE", "partition, zone, image ... of your site: a copy of flmjax/launch/site.toml"),
    ),
}


def takes_config(command: str) -> bool:
    """Whether a command reads a config file; report reads the config of the workdir."""
    return command != "report"


def continues(command: str) -> bool:
    """Whether a command without --config goes on with the config of the workdir."""
    return command in ("train", "prepare")


def takes_workdir(command: str) -> bool:
    """Whether a command works in one workdir: plan has none, report reads any number, and launch names it only."""
    return command not in ("plan", "report", "launch")


class CommandLine(NamedTuple):
    """A command line that was understood.

    Attributes:
        command: a name of COMMANDS.
        config, workdir: None where the command takes none; a dry run needs no workdir.
        options: the values of the command's OPTIONS, by name.
    """

    command: str
    config: RunConfig | None
    workdir: Path | None
    options: dict[str, Any]


class Flags(NamedTuple):
    """The flags of a command line, each understood by itself.

    Attributes:
        config: FILE[:WORDS]; None without --config.
        workdir: None without --workdir.
        overrides: values of the settings that flags set, by the path of the field.
        options: the values of the command's OPTIONS, by name.
    """

    config: str | None
    workdir: Path | None
    overrides: dict[str, Any]
    options: dict[str, Any]


def parse(argv: list[str]) -> CommandLine:
    """The command line `argv`, without the program's name.

    Raises:
        ConfigError or absl.flags.Error: for anything that is not understood, with the nearest names.
    """
    command = check_command(argv[0])
    kind, arguments = split_kind(command, argv[1:])
    values = read_flags(command, arguments)
    workdir, options = values.workdir, values.options
    if command == "grow" and not options["source"]:
        raise ConfigError(f"--source is missing: the workdir of the run to grow; {usage(command)}")
    if command == "launch" and kind is None:
        raise ConfigError(f"KIND is missing: {', '.join(KINDS)}; {usage(command)}")
    if command in ("report", "launch"):
        is_missing = not options["workdir"]
    else:
        is_missing = takes_workdir(command) and workdir is None and not options.get("dry_run")
    if is_missing:
        raise ConfigError(f"--workdir is missing; {usage(command)}")
    if not takes_config(command):
        return CommandLine(command, None, workdir, options)
    config = read_config(command, values)
    if config is None:
        absent = f"; {workdir} holds no run whose config could be read" if continues(command) else ""
        raise ConfigError(f"--config is missing{absent}; {usage(command)}")
    if command == "launch":
        if not options["output"]:
            raise ConfigError(f"--output is missing; {usage(command)}")
        options = {**options, "kind": kind, "flags": train_flags(values)}
    return CommandLine(command, validate(config), workdir, options)


def split_kind(command: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The kind of launch file of `flmjax launch KIND`, None without one, and the arguments after it."""
    if command != "launch" or not arguments or arguments[0].startswith("-"):
        return None, arguments
    return check_kind(arguments[0]), arguments[1:]


def train_flags(values: Flags) -> tuple[str, ...]:
    """The flags of `flmjax train` that make the same config."""
    return f"--config={values.config}", *(f"--config.{path}={value}" for path, value in values.overrides.items())


def usage(command: str) -> str:
    """One line with the flags of a command."""
    return f"usage: flmjax {command} {USAGES[command]}"


def check_command(word: str) -> str:
    """The name of a command.

    Raises:
        ConfigError: for another word, with the nearest names.
    """
    if word not in COMMANDS:
        raise ConfigError(f"unknown command '{word}'{nearest(word, COMMANDS)}")
    return word


def read_flags(command: str, arguments: list[str]) -> Flags:
    """The flags of a command.

    Raises:
        ConfigError or absl.flags.Error: for a flag, a field or a value that is not understood.
    """
    values = flags.FlagValues()
    try:
        arguments = values.read_flags_from_files(arguments, force_gnu=False)
    except UnicodeError as error:
        files = ", ".join(shorten(argument, str) for argument in arguments if "flagfile" in argument)
        raise ConfigError(f"{files}: the file is not UTF-8: {error}") from None
    fields: dict[str, Any] = {}
    if takes_config(command):
        CONFIG.define(values)
        fields = _define_overrides(values, arguments)
    if takes_workdir(command):
        WORKDIR.define(values)
    holders = {option.name.replace("-", "_"): option.define(values) for option in OPTIONS[command]}
    _read_values(command, values, arguments)
    options = {name: holder.value for name, holder in holders.items()}
    for option in OPTIONS[command]:
        if option.is_repeated:
            options[option.name] = tuple(str(_folder(option, value)) for value in options[option.name] if value)
        elif option.is_folder and options[option.name]:
            options[option.name] = str(_folder(option, options[option.name]))
        elif option.type is range and options[option.name] is not None:
            options[option.name] = _window(option, options[option.name])
    overrides = {path: _override_value(values[f"config.{path}"].value, hint, path) for path, hint in fields.items()}
    config = values["config"].value if takes_config(command) else None
    workdir = _folder(WORKDIR, values["workdir"].value or "") if takes_workdir(command) else None
    return Flags(config, workdir, overrides, options)


def _read_values(command: str, values: flags.FlagValues, arguments: list[str]) -> None:
    """Let absl read the values of the defined flags; raises ConfigError for what it does not understand."""
    try:
        rest = values(["flmjax", *arguments])
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(_unknown_flag(command, error.flagname)) from None
    except flags.Error as error:
        raise ConfigError(_faulty_value(command, one_line(error))) from None
    except ValueError as error:  # --noFLAG=VALUE
        raise ConfigError(f"{one_line(error)}; {usage(command)}") from None
    for name in values:
        if str(values[name].value).startswith("--"):  # absl takes the next flag for the value
            raise ConfigError(f"--{name} has no value; {usage(command)}")
    if len(rest) > 1:
        raise ConfigError(f"'{rest[1]}' is not a flag; {usage(command)}")


def read_config(command: str, values: Flags) -> RunConfig | None:
    """The config with its overrides, rules between fields not yet checked.

    It is the config of --config; without this flag, that of the run in the workdir, or for `grow` one that continues
    the source; None without all of them.

    Raises:
        ConfigError: for a file that cannot be read, or an override of an entry that the config does not have.
    """
    if values.config:
        config = load_config(values.config)
    elif continues(command) and values.workdir is not None and _is_run(values.workdir):
        config = read_workdir_config(values.workdir)
    elif command == "grow" and values.options["source"]:
        from flmjax.training.grow_config import grown_config, source_config

        if is_url(values.options["source"]):
            raise ConfigError(f"--config is missing; growth from a run on object storage needs it; {usage(command)}")
        base = source_config(Path(values.options["source"]))
        return grown_config(_overridden(base, values), base)
    else:
        return None
    return _overridden(config, values)


def _is_run(workdir: Path) -> bool:
    """Whether a workdir has a config; raises ConfigError for a store that cannot be used."""
    if is_url(workdir):
        connect(str(workdir))
    return (workdir / "config.json").is_file()


def _overridden(config: RunConfig, values: Flags) -> RunConfig:
    overridden = config
    for path, value in values.overrides.items():
        overridden = override(overridden, path, value)
    for path in values.overrides:
        refuse_unread((config, overridden), path)
    return overridden


def _define_overrides(values: flags.FlagValues, arguments: list[str]) -> dict[str, Any]:
    """Add a flag for each setting that is set; the types of their fields, by path."""
    fields: dict[str, Any] = {}
    for argument in arguments:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match is None or match[2] in fields:
            continue
        path = match[2]
        fields[path] = field_type(path)
        if fields[path] is bool:
            flags.DEFINE_boolean(f"config.{path}", None, OVERRIDE.help, flag_values=values)
        else:
            flags.DEFINE_multi_string(f"config.{path}", None, OVERRIDE.help, flag_values=values)
    return fields


def _override_value(value: Any, hint: Any, path: str) -> Any:
    """Value of a setting from its flags, bool or texts; several flags make a tuple, else the last one counts."""
    if isinstance(value, bool):
        return value
    parsed = [parse_value(text, hint, f"config.{path}") for text in value]
    is_joined = len(parsed) > 1 and all(isinstance(entry, tuple) for entry in parsed)
    return tuple(itertools.chain(*parsed)) if is_joined else parsed[-1]


def _folder(option: Option, value: str) -> Path | None:
    """The folder that a flag names, with ~ expanded; None for "".

    Raises:
        ConfigError: for a file or a link to nothing, and for a folder below one of them.
        OSError: for a path that the file system refuses.

    The workdir of a run may be a URL on object storage.
    """
    if not value:
        return None
    if option.name in ("workdir", "source") and is_url(value):
        return run_path(value, f"--{option.name}")
    folder = local_path(value, f"--{option.name}")
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise ConfigError(
                f"--{option.name}={value}: {path} is a link to {os.readlink(path)}, which does not exist; create that "
                "folder or name another"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--{option.name}={value}: {path} is a file; name a folder")
    return folder


def _window(option: Option, value: str) -> range:
    """range(START, START + STEPS) for `START:STEPS`."""
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", value)
    if match is None or int(match[2]) == 0:
        raise ConfigError(
            f"--{option.name}={value} must be {option.value}, an update's number and a positive number of updates"
        )
    return range(int(match[1]), int(match[1]) + int(match[2]))


def _unknown_flag(command: str, name: str) -> str:
    others = [*(option.name for options in OPTIONS.values() for option in options), CONFIG.name, WORKDIR.name]
    known = [option.name for option in OPTIONS[command]]
    known += [CONFIG.name] * takes_config(command) + [WORKDIR.name] * takes_workdir(command)
    head = name.partition(".")[0]
    if head in others and head not in known:
        return f"'flmjax {command}' takes no --{head}; {usage(command)}"
    return f"unknown flag '--{name}'{nearest(head, known)}"


def _faulty_value(command: str, message: str) -> str:
    """The message of absl about the value of a flag, in the words of the other refusals."""
    if match := re.match(r"Missing value for flag (\S+)", message):
        return f"{match[1]} has no value; {usage(command)}"
    if match := re.match(r"flag --([^=]+)=(.*?): ", message):
        types = {option.name: option.type for option in OPTIONS[command] if option.value is not None}
        words = {int: "an integer that is not negative", float: "a positive number"}
        return f"--{match[1]}={match[2]} must be {words.get(types.get(match[1], bool), 'True or False')}"
    return message


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())
