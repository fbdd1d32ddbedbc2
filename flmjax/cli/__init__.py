"""`flmjax COMMAND --config=FILE[:WORDS] [--config.FIELD=VALUE ...] --workdir=DIR`: flags to dataclasses to one call."""

import io
import os
import signal
import sys

from absl import flags, logging

from flmjax.cli.commands import COMMANDS
from flmjax.cli.help import help_text, version_text, wants_help
from flmjax.cli.parsing import CommandLine, one_line, parse
from flmjax.config import ConfigError, shorten
from flmjax.hardware import hide_plugins
from flmjax.interrupt import end_at_interrupts, end_silently_at_interrupts

__all__ = ["COMMANDS", "CommandLine", "main", "parse", "run"]


def main(argv: list[str]) -> int:
    """Run a command line (without the program's name).

    Returns:
        The exit status: 0, 1 for an error while the command ran, 2 for a command line that cannot be meant, 130 for an
        interruption.
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
    except (ConfigError, flags.Error) as error:
        print(f"flmjax: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # of standard output: run
            raise
        print(f"flmjax: {shorten(str(error.filename), str)}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while a config file is loaded
        print("flmjax: interrupted", file=sys.stderr)
        return 130
    return _execute(line)


def _execute(line: CommandLine) -> int:
    """Run a command; returns the exit status."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        positional = [x for x in (line.config, line.workdir) if x is not None]
        COMMANDS[line.command](*positional, **line.options)
    except ConfigError as error:
        print(f"flmjax: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of standard output is gone, and the work is not done
        _discard_output()
        return 128 + signal.SIGPIPE
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("FLMJAX_TRACEBACK"):
            raise
        print(f"flmjax: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        where = f": {error}" if str(error) else ""
        resume = "; run the same command again to go on" if line.command == "train" else ""
        print(f"flmjax: interrupted{where}{resume}", file=sys.stderr)
        return 130
    return 0


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
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for example, has closed the pipe
        _discard_output()
        status = 0
    except OSError as error:
        _discard_output()
        if status == 0:
            print(f"flmjax: standard output: {error.strerror}", file=sys.stderr)
        status = status or 1
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
