"""Signals that end a process of the command line: one line and a status, however early, and never swallowed.

Ctrl-C (SIGINT) ends with status 130, SIGTERM and SIGUSR1 from the start of a command's work on with status 75.

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
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)  # of Slurm, Kubernetes and others; SIGUSR1 by choice of the user
INTERRUPTED_STATUS = 130
STOPPED_STATUS = 75  # EX_TEMPFAIL: the same command goes on
STARTED = time.monotonic()  # about the start of a process of the command line, which imports this file first


class Stopped(KeyboardInterrupt):
    """A command ends early, by a signal or a time limit; the same command continues it.

    Args:
        reason: "SIGTERM" for example; "SIGINT" is Ctrl-C.
        where: the step reached and the newest saved step, for the message.
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
        return INTERRUPTED_STATUS if self.reason == "SIGINT" else STOPPED_STATUS


def end_at_interrupts() -> None:
    """From now on SIGINT ends the process with one line on standard error."""
    signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """From now on a signal raises an exception in the main thread, if `end_at_interrupts` was called.

    SIGINT raises KeyboardInterrupt, SIGTERM and SIGUSR1 raise Stopped, which is one.

    Python drops an exception that is raised in a callback, of the garbage collector for example; this one is then
    raised again a moment later.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in PREEMPTIONS:
            signal.signal(number, _raise_stopped)
        sys.unraisablehook = _raise_again


def end_silently_at_interrupts() -> None:
    """From now on SIGINT ends the process silently, and others do nothing: only threads are left to end."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in PREEMPTIONS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED_STATUS))


def _raise_stopped(number: int, _frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"flmjax: interrupted\n")
    os._exit(INTERRUPTED_STATUS)


def _raise_again(dropped: "UnraisableHookArgs") -> None:
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        interrupt = dropped.exc_value or dropped.exc_type()

        def raise_it(*_: object) -> None:
            raise interrupt

        signal.signal(signal.SIGALRM, raise_it)
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)
    else:
        sys.__unraisablehook__(dropped)
