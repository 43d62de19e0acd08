"""Tells whether the process of another rank still exists, where that can be proved.

A process is looked up only by one that shares its machine and its table of processes: from another
container the same number is another process. Imports the standard library.
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, and not a later one with the same number.

    >>> me = ProcessIdentity.current()
    >>> me.has_ended(me)
    False
    """

    host: str
    pid: int
    space: str
    """Boot of the machine and table of processes; "" where they are not known."""
    started: str
    """When the process started, in ticks of the machine's clock."""

    @classmethod
    def current(cls) -> ProcessIdentity:
        """Returns the identity of this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _space(), _status(pid)[1])

    def has_ended(self, observer: ProcessIdentity) -> bool:
        """Returns whether the process has ended for sure.

        Args:
            observer: identity of the process that asks.
        """
        if not self.space or self.space != observer.space:
            return False
        state, started = _status(self.pid)
        return state in ("", "Z", "X") or started != self.started

    def kill(self, observer: ProcessIdentity) -> None:
        """Ends the process, if it is on this machine and still the same one.

        Args:
            observer: identity of the process that asks.
        """
        if self.space and self.space == observer.space and not self.has_ended(observer):
            os.kill(self.pid, signal.SIGKILL)

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _status(pid: int) -> tuple[str, str]:
    """State and start of a process, empty if there is none; ``man 5 proc_pid_stat``."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", ""
    # The name of the program comes before, in brackets, and may contain anything.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
