"""The handler of the signals that ask a run to end: it notes the signal and does nothing else.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from _thread import start_new_thread
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

UNWIND = 10.0
"""Seconds for the exception hooks of a fit that has not come to the end of a step in time."""


class SignalFlag:
    """Holds the first signal that asks this process to end, and gives up after a while.

    A handler runs wherever the main thread happens to be: inside a collective, an update or a save.
    So it notes the signal and starts a clock, nothing else; the fit acts on it between two steps.
    Later signals change nothing, nor do they interrupt what the fit does about the first one.

    Where `grace` seconds pass and the fit has not called `act`, it is not known whether the main
    thread will ever come to the end of a step: it may validate for an hour, or wait in a collective
    for a rank that is gone. The clock, a thread, then calls `too_late`, and has the main thread
    raise an exception, so that the callbacks of the fit end properly. If the main thread does not
    come out of a call into C for `UNWIND` seconds more, the thread ends the process, which is what
    the signal would have done without a handler.

    Args:
        handlers: signals to handle, and for each what else to call for it, or None.
        grace: seconds.
        too_late: called with the signal, in the thread.
        ending: returns the exception to raise in the main thread.
    """

    def __init__(
        self,
        handlers: Mapping[int, Callable[[int, FrameType | None], Any] | None],
        grace: float,
        too_late: Callable[[int], None],
        ending: Callable[[int], BaseException],
    ) -> None:
        self.received = 0
        """The first signal, 0 if none has come."""
        self._handlers, self._grace = dict(handlers), grace
        self._too_late, self._ending = too_late, ending
        self._process, self._thread_id = os.getpid(), threading.get_ident()
        self._acts = self._expired = False
        self._acted: queue.SimpleQueue[None] = queue.SimpleQueue()

    def install(self) -> None:
        """Installs the handlers; to be called in the main thread."""
        for signum in self._handlers:
            signal.signal(signum, self._handle)

    def act(self) -> None:
        """Notes that the fit acts on the signal now; no signal interrupts it any more."""
        self._acts = True
        self._acted.put(None)

    def close(self) -> None:
        """Stops the clock at the end of the fit, where Lightning restores the handlers."""
        self.act()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._in_a_fork(signum, frame)
            return
        if self._acts:
            return
        if self._expired:
            self._expired = False
            raise self._ending(self.received)
        if not self.received:
            self.received = signum
            leave_workers_alone()
            # Not `threading`: the handler may interrupt code that holds one of its locks.
            start_new_thread(self._wait, (signum,))
        if (handler := self._handlers[signum]) is not None:
            handler(signum, frame)

    def _in_a_fork(self, signum: int, frame: FrameType | None) -> None:
        """Handles a signal in a process that was forked from this one, such as a loader's worker.

        Only SIGTERM is for it; the others are sent to all processes of a job and mean the fit.
        """
        if signum != signal.SIGTERM:
            return
        handler = self._handlers[signum]
        if handler is not None:
            handler(signum, frame)
            return
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    def _wait(self, signum: int) -> None:
        if self._acts_within(self._grace):
            return
        self._expired = True
        self._too_late(signum)
        signal.pthread_kill(self._thread_id, signum)
        if not self._acts_within(UNWIND):
            self._end(signum)

    def _acts_within(self, seconds: float) -> bool:
        try:
            self._acted.get(timeout=seconds)
        except queue.Empty:
            return False
        return True

    @staticmethod
    def _end(signum: int) -> NoReturn:
        os._exit(exit_code(signum))


def exit_code(signum: int) -> int:
    """Returns the exit code of a process that a signal has ended, as shells and schedulers read it.

    >>> exit_code(signal.SIGTERM), exit_code(signal.SIGUSR1)
    (143, 138)
    """
    return 128 + int(signum)


def is_free(signum: int, handler: Any) -> bool:
    """Returns whether nothing handles a signal, so that it would end the process.

    Args:
        signum: the signal.
        handler: what ``signal.getsignal`` returned for it. Python does not know of handlers that
            are installed from C, as ``faulthandler.register`` does; Linux does.
    """
    if handler != signal.SIG_DFL:
        return False
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    lines = status.splitlines()
    caught = next((line for line in lines if line.startswith("SigCgt:")), "SigCgt: 0")
    return not int(caught.split()[1], 16) >> (signum - 1) & 1


def leave_workers_alone() -> None:
    """Has the end of a loader's worker no longer raise an exception in the middle of a step.

    A signal to all processes of a job ends the workers too. Torch's handler of SIGCHLD then raises
    wherever the main thread is; without it, the next fetch of a batch raises.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
