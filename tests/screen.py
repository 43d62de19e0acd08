"""Runs a program on a terminal of its own, and renders what it prints as a terminal shows it."""

import os
import pty
import sys

import pyte

from tests.programs import Program
from tests.project import ROOT


def printed_on_a_terminal(arguments, **options):
    """The bytes that a Python program writes to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "NO_COLOR", "CI", "TQDM_DISABLE"):
        environment.pop(name, None)
    streams = {"stdout": theirs, "stderr": theirs}
    process = Program(
        [sys.executable, *arguments], cwd=ROOT, env=environment, **(streams | options)
    )
    os.close(theirs)
    data = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    assert process.wait() == 0, data.decode(errors="replace")
    return data


def _read(descriptor):
    try:
        return os.read(descriptor, 2**16)
    except OSError:  # Linux reports the end of a pseudo-terminal as an error
        return b""


def rendered(data, columns):
    """The rows of a terminal of this width after the bytes, those that have scrolled by too."""
    screen = pyte.HistoryScreen(columns, 50, history=5000, ratio=1)
    pyte.ByteStream(screen).feed(data)
    gone = ["".join(row[i].data for i in range(columns)) for row in screen.history.top]
    return [row.rstrip() for row in [*gone, *screen.display]]
