"""`flmjax COMMAND --config=configs/x.py[:arg] [--config.a.b=v ...] --workdir=DIR`: flags to dataclasses to one call."""

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from flmjax.config import ConfigError, RunConfig, check_path, from_config_dict, nearest
from flmjax.config.validate import validate

USAGE = "usage: flmjax COMMAND --config=configs/x.py[:arg] [--config.a.b=v ...] --workdir=DIR"
USAGE_GROW = "usage: flmjax grow --config=FILE --source=WORKDIR (--workdir=DIR [--weights-only] | --dry-run)"


def train(config: RunConfig, workdir: Path) -> None:
    """Train the schedule of stages, or go on with it."""
    from flmjax.report.run_page import write_report
    from flmjax.training.loop import train as run

    run(config, workdir)
    print(f"report: {write_report(workdir)}", flush=True)


def prepare(config: RunConfig, workdir: Path, inspect: int) -> None:
    """Turn text into token files, or check them; --inspect=N shows N samples."""
    from flmjax.data.inspection import show_samples, summary
    from flmjax.data.loader import TrainingStream
    from flmjax.data.prepare import prepare as run
    from flmjax.workdir.paths import data_directory

    data = run(config.data, data_directory(config, workdir), progress=True, full_check=True)
    stream = TrainingStream.of_run(config, data)
    print(summary(stream), flush=True)
    for text in show_samples(stream, inspect, sys.stdout.isatty()):
        print(text, flush=True)


def grow(config: RunConfig, workdir: Path, source: str, dry_run: bool, weights_only: bool) -> None:
    """Grow another run's newest checkpoint into the first stage's model."""
    from flmjax.training.grow_checkpoint import grow_checkpoint, plan_checkpoint

    if dry_run:
        print(plan_checkpoint(config, Path(source)), flush=True)
        return
    grow_checkpoint(config, Path(source), workdir, weights_only)
    print(f"{workdir}: checkpoint at step 0; 'flmjax train' with this config and workdir goes on from it", flush=True)


def plan(
    config: RunConfig,
    price: float | None,
    tflops: float | None,
    cost_only: bool,
    search_layout: bool,
    output: str | None,
) -> None:
    """Compile a run for a machine that is not here: memory, time, price."""
    from flmjax.planning.topology import TooLargeError
    from flmjax.report.plan_table import cost_table, plan_table
    from flmjax.stderr import captured_stderr

    given = {"--cost-only": cost_only, "--search-layout": search_layout, "--output": output is not None}
    asked = [flag for flag, is_given in given.items() if is_given]
    if len(asked) > 1:
        raise ConfigError(f"{asked[1]} is not read with {asked[0]}; take one of them")
    if tflops is not None and not cost_only:
        raise ConfigError(f"--tflops={tflops:g} is read with --cost-only alone; a plan estimates the speed")
    if price is not None and search_layout:
        raise ConfigError(f"--price={price:g} is not read with --search-layout: the fewest days are the cheapest")
    for flag, value in (("price", price), ("tflops", tflops)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{flag}={value:g} must be a positive number")
    if cost_only:
        print(cost_table(config, tflops, price), flush=True)
        return
    log = lambda text: print(f"compiling: {text}", file=sys.stderr, flush=True)
    with captured_stderr():  # the CUDA plugin reports that this machine has no GPU
        from flmjax.planning.layout_search import layout_table, search_layouts
        from flmjax.planning.planner import make_plan
    if search_layout:
        print(layout_table(search_layouts(config, log)), flush=True)
        return
    made = make_plan(config, price, log)
    print(plan_table(made), flush=True)
    if output is not None:
        from flmjax.report.plan_page import write_plan

        print(f"plan: {write_plan(made, Path(output))}", flush=True)
    if made.refusals:
        raise TooLargeError(made.refusals[0])


def report(workdir: Path) -> None:
    """Write report.html of a run, finished or not."""
    from flmjax.report.run_page import write_report

    print(f"report: {write_report(workdir)}", flush=True)


# Imports live in the functions: a typo is answered before JAX is loaded.
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "prepare": prepare,
    "grow": grow,
    "plan": plan,
    "report": report,
}


def main(argv: list[str]) -> int:
    """Run a command line (without the program's name); returns the exit status: 2 for one that cannot be meant."""
    try:
        command, config, workdir, options = parse(argv)
    except (ConfigError, flags.Error) as error:
        print(f"flmjax: {_one_line(error)}", file=sys.stderr)
        return 2
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        positional = [x for x in (config, workdir) if x is not None]
        COMMANDS[command](*positional, **options)
    except ConfigError as error:
        print(f"flmjax: {_one_line(error)}", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("FLMJAX_TRACEBACK"):
            raise
        print(f"flmjax: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if command == "train" else ""
        print(f"flmjax: interrupted{goes_on}", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> tuple[str, RunConfig | None, Path | None, dict[str, Any]]:
    """(command, config and workdir or None where the command takes none, the command's own options).

    Raises:
        ConfigError or absl.flags.Error: whatever is not understood, with the nearest names.
    """
    if not argv or argv[0] not in COMMANDS:
        if not argv or argv[0] in ("-h", "--help", "help"):
            commands = "; ".join(f"{name}: {function.__doc__}" for name, function in COMMANDS.items())
            raise ConfigError(f"{USAGE}; {commands}")
        raise ConfigError(f"unknown command '{argv[0]}'{nearest(argv[0], COMMANDS)}; commands: {', '.join(COMMANDS)}")
    command = argv[0]
    values = flags.FlagValues()
    # Expanded first: ml_collections finds overrides by looking through the arguments.
    arguments = values.read_flags_from_files(argv[1:], force_gnu=False)
    workdir = flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    config = None if command == "report" else _define_config(values, arguments)
    own = OPTIONS[command](values) if command in OPTIONS else {}
    _parse_flags(values, arguments)
    options = {name: flag.value for name, flag in own.items()}
    if command == "grow" and options["source"] is None:
        raise ConfigError(f"--source is missing: the workdir of the run to grow; {USAGE_GROW}")
    if workdir.value is None and not options.get("dry_run") and command != "plan":
        raise ConfigError(f"--workdir is missing; {USAGE}")
    folder = None if command == "plan" else Path(workdir.value or "")
    if config is None:
        return command, None, folder, options
    if config.value is None:
        raise ConfigError(f"--config is missing; {USAGE}")
    try:
        tree = dict(config.value)
    except OSError:  # said at the first use of a file that could not be loaded
        raise ConfigError(f"there is no config file '{values['config'].config_filename}'") from None  # type: ignore[attr-defined]
    return command, validate(from_config_dict(tree)), folder, options


def _define_grow(values: flags.FlagValues) -> dict[str, flags.FlagHolder]:
    """The options of grow."""
    return {
        "source": flags.DEFINE_string("source", None, "workdir of the run to grow", flag_values=values),
        "dry_run": flags.DEFINE_boolean("dry-run", False, "print the plan and stop", flag_values=values),
        "weights_only": flags.DEFINE_boolean("weights-only", False, "leave the moments behind", flag_values=values),
    }


def _define_prepare(values: flags.FlagValues) -> dict[str, flags.FlagHolder]:
    """The options of prepare."""
    text = "samples to show, decoded"
    return {"inspect": flags.DEFINE_integer("inspect", 0, text, lower_bound=0, flag_values=values)}


def _define_plan(values: flags.FlagValues) -> dict[str, flags.FlagHolder]:
    """The options of plan."""
    speed = "with --cost-only: model TFLOP/s of a device"
    search = "search mesh, microbatches and remat"
    search = "search mesh, microbatches and remat"
    return {
        "price": flags.DEFINE_float("price", None, "dollars for a device-hour", 0.0, flag_values=values),
        "tflops": flags.DEFINE_float("tflops", None, speed, 0.0, flag_values=values),
        "cost_only": flags.DEFINE_boolean("cost-only", False, "compile nothing", flag_values=values),
        "search_layout": flags.DEFINE_boolean("search-layout", False, search, flag_values=values),
        "output": flags.DEFINE_string("output", None, "folder for plan.json and plan.html", flag_values=values),
    }


OPTIONS = {"grow": _define_grow, "plan": _define_plan, "prepare": _define_prepare}


def _define_config(values: flags.FlagValues, arguments: list[str]) -> flags.FlagHolder:
    """The --config flag; overrides of fields that do not exist are refused before anything is loaded."""
    for argument in arguments:
        if override := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            check_path(override[1])
    return config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["flmjax", *arguments])


def _parse_flags(values: flags.FlagValues, arguments: list[str]) -> None:
    try:
        rest = values(["flmjax", *arguments])
    except IndexError:
        indexed = " ".join(a for a in arguments if re.match(r"--?config\.[^=]*\[", a))
        raise ConfigError(f"there is no such entry: {indexed}") from None
    except (AttributeError, KeyError, TypeError, NameError, SyntaxError) as error:  # from a config file
        raise ConfigError(f"the config file cannot be read: {type(error).__name__}: {_one_line(error)}") from error
    if len(rest) > 1:
        raise ConfigError(f"'{rest[1]}' is not a flag; {USAGE}")


def _one_line(error: BaseException) -> str:
    """The message; of a config file's traceback, which the flag quotes whole, the last line."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = f"{text.splitlines()[0].split(': ')[0]}: {text.strip().splitlines()[-1].split(': ', 1)[-1]}"
    # A locked ConfigDict lists all its fields before the one that was meant.
    text = re.sub(r" and cannot be added.*(?=Did you mean)", "; ", text.replace("\\n", " "), flags=re.DOTALL)
    return " ".join(text.split())


def run() -> None:
    """Console script."""
    sys.exit(main(sys.argv[1:]))
