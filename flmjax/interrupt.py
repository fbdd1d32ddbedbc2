"""Ctrl-C (SIGINT) in a process of the command line: one line and exit status 130, however early, and never swallowed.

Until a command starts its work nothing has to be closed, and an exception would be turned into another one, or into a
traceback, by the import that it interrupts: the process ends at once. Later SIGINT raises KeyboardInterrupt.
"""

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

RETRY_SECONDS = 0.05
STATUS = 130


def end_at_interrupts() -> None:
    """From now on SIGINT ends the process with one line on standard error."""
    signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """From now on SIGINT raises KeyboardInterrupt in the main thread, if `end_at_interrupts` was called.

    Python drops an exception that is raised in a callback, of the garbage collector for example; this one is then
    raised again a moment later.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        sys.unraisablehook = _raise_again


def end_silently_at_interrupts() -> None:
    """From now on SIGINT ends the process without a word: its line is printed, and its threads are waited for."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGINT, lambda *_: os._exit(STATUS))


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"flmjax: interrupted\n")
    os._exit(STATUS)


def _raise_again(dropped: "UnraisableHookArgs") -> None:
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)
    else:
        sys.__unraisablehook__(dropped)
