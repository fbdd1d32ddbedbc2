"""Ctrl-C (SIGINT) in a process of the command line: one line and exit status 130, however early, and never swallowed.

Until a command starts its work nothing has to be closed, and an exception would be turned into another one, or into a
traceback, by the import that it interrupts: the process ends at once. Later SIGINT raises KeyboardInterrupt. A run in
training saves first (training/stopping.py).
"""

import os
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

RETRY_SECONDS = 0.05
STATUS = 130
STOPPED_STATUS = 75  # EX_TEMPFAIL: the same command goes on
STARTED = time.monotonic()  # about the start of a process of the command line, which imports this file first


class Stopped(KeyboardInterrupt):
    """The end of a run before its last step, which a signal or a limit of time asked for; the same command goes on.

    Args:
        reason: "SIGTERM" for example; "SIGINT" is Ctrl-C.
        where: the step, for the user.
        is_agreed: whether every process of the run ends now, at the same step.
    """

    def __init__(self, reason: str, where: str = "", is_agreed: bool = False) -> None:
        super().__init__(where)
        self.reason, self.is_agreed = reason, is_agreed

    def at(self, where: str) -> "Stopped":
        """The same end, with its step."""
        return Stopped(self.reason, where, self.is_agreed)

    @property
    def status(self) -> int:
        """Exit status of the process."""
        return STATUS if self.reason == "SIGINT" else STOPPED_STATUS


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
        interrupt = dropped.exc_value or dropped.exc_type()

        def raise_it(*_: object) -> None:
            raise interrupt

        signal.signal(signal.SIGALRM, raise_it)
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)
    else:
        sys.__unraisablehook__(dropped)
