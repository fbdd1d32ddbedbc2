"""`flmjax COMMAND --config=FILE[:WORDS] [--config.FIELD=VALUE ...] --workdir=DIR`: flags to dataclasses to one call."""

import io
import os
import signal
import sys
import traceback
from types import ModuleType

from absl import flags, logging

from flmjax.cli.commands import COMMANDS
from flmjax.cli.help import help_text, version_text, wants_help
from flmjax.cli.parsing import CommandLine, one_line, parse
from flmjax.config import ConfigError, shorten
from flmjax.hardware import hide_plugins
from flmjax.interrupt import INTERRUPTED_STATUS, Stopped, end_at_interrupts, end_silently_at_interrupts
from flmjax.sharding.environment import is_first, launcher_place

SEVERAL_PROCESSES = ("train",)  # commands that run in several processes

__all__ = ["COMMANDS", "CommandLine", "main", "parse", "run"]


def main(argv: list[str]) -> int:
    """Run a command line (without the program's name).

    Returns:
        The exit status: 0, 1 for an error while the command ran, 2 if the command line or the config is wrong, 75 for a
        run that was stopped and goes on with the same command, 130 for Ctrl-C.
    """
    _show_any_characters()
    if argv[:1] != ["plan"]:
        hide_plugins()
    try:
        if argv == ["--version"]:
            print(version_text())
            return 0
        if wants_help(argv):
            print(help_text(argv))
            return 0
        line = parse(argv)
        _check_processes(line.command)
    except (ConfigError, flags.Error) as error:
        return _refuse(one_line(error))
    except OSError as error:
        if error.filename is None:  # of standard output: run
            raise
        return _refuse(f"{shorten(str(error.filename), str)}: {error.strerror}")
    except KeyboardInterrupt:  # while a config file is loaded
        print("flmjax: interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    return _execute(line)


def _check_processes(command: str) -> None:
    """Refuse a launcher's processes to a command that runs in one.

    Raises:
        ConfigError: naming the launcher.
    """
    place = launcher_place()
    if place is not None and command not in SEVERAL_PROCESSES:
        raise ConfigError(
            f"'flmjax {command}' runs in one process, and {place.launcher} started {place.processes}; only "
            f"{' and '.join(SEVERAL_PROCESSES)} runs in several"
        )


def _refuse(text: str) -> int:
    """Print why the command line or the config is wrong; of several processes, the first one does."""
    if is_first():
        print(f"flmjax: {text}", file=sys.stderr)
    return 2


def _execute(line: CommandLine) -> int:
    """Run a command; returns the exit status. With an error, one of several processes does not return."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING if is_first() else logging.ERROR)
    try:
        positional = [x for x in (line.config, line.workdir) if x is not None]
        COMMANDS[line.command](*positional, **line.options)
    except ConfigError as error:
        return _fail(error, one_line(error), 2)
    except BrokenPipeError as error:  # the reader of standard output is gone, and the work is not done
        _discard_output()
        _leave(error, "standard output is closed", 128 + signal.SIGPIPE)
        return 128 + signal.SIGPIPE
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("FLMJAX_TRACEBACK"):
            traceback.print_exc()
        return _fail(error, f"{type(error).__name__}: {one_line(error)}", 1)
    except KeyboardInterrupt as error:
        return _interrupted(error, line.command)
    return 0


def _fail(error: Exception, text: str, status: int) -> int:
    """Print the line of an error; returns the exit status."""
    _leave(error, text, status)
    print(f"flmjax: {text}", file=sys.stderr)
    return status


def _interrupted(error: KeyboardInterrupt, command: str) -> int:
    """Print the line of an interrupted command; returns the exit status."""
    status, reason = (error.status, error.reason) if isinstance(error, Stopped) else (INTERRUPTED_STATUS, "SIGINT")
    cause = "interrupted" if status == INTERRUPTED_STATUS else f"stopped by {reason}"
    where = f": {error}" if str(error) else ""
    text = f"{cause}{where}{'; run the same command again to go on' if command == 'train' else ''}"
    if not (isinstance(error, Stopped) and error.is_agreed):
        _leave(error, text, status)
    if (processes := _processes()) is None or not processes.is_not_first():
        print(f"flmjax: {text}", file=sys.stderr)
    return status


def _leave(error: BaseException, text: str, status: int) -> None:
    """End this process at once if the run has several."""
    if (processes := _processes()) is not None:
        processes.leave(error, text, status)


def _processes() -> ModuleType | None:
    """The module of the processes of a run, if this process has loaded it with JAX."""
    return sys.modules.get("flmjax.sharding.processes")


def _show_any_characters() -> None:
    """Let a terminal of any encoding show names and texts of any characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run() -> None:
    """Run the command line of this process, and end it."""
    end_at_interrupts()
    _open_closed_streams()
    status = 0
    try:
        status = main(sys.argv[1:])
        end_silently_at_interrupts()
        if (processes := _processes()) is not None:
            processes.end_processes()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for example, has closed the pipe
        _discard_output()
        status = 0
    except OSError as error:
        _discard_output()
        if status == 0:
            print(f"flmjax: standard output: {error.strerror}", file=sys.stderr)
        status = status or 1
    except Exception as error:  # a fault of flmjax
        traceback.print_exc()
        _leave(error, f"{type(error).__name__}: {one_line(error)}", 1)
        status = 1
    sys.exit(status)


def _open_closed_streams() -> None:
    """Give a process that starts without standard output or error (`>&-`) the null device in their place.

    Otherwise the next file that is opened, a checkpoint for example, becomes the standard output of C++.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _discard_output() -> None:
    """Send what standard output still holds, and all that follows, to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
