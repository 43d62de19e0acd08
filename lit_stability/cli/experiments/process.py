"""Runs the command `fit` in a process of its own.

Imports neither torch nor Lightning: a run that crashes its interpreter does not affect the others.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OUTPUT = "output.txt"
"""Name of the file in the run's folder that receives its console output."""
_GRACE = 10.0
"""Seconds that an interrupted run is given to end by itself."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    started: float
    """Unix time, in s."""
    seconds: float
    """Wall-clock time in s, including imports."""


def fit_in_process(arguments: Sequence[str], run_dir: Path) -> Ended:
    """Runs ``lit-stability fit`` and writes its output to ``output.txt`` in the folder of the run.

    Args:
        arguments: Of the command, without `run_dir`.
        run_dir: Folder of the run, created here.

    Raises:
        KeyboardInterrupt: After the process, which is interrupted as well, has ended.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    quiet = "trainer.enable_progress_bar=false"  # in a file, it adds one line per step
    own = [quiet, *arguments, f"run_dir={run_dir}"]
    command = [sys.executable, "-m", "lit_stability.cli.main", "fit", *own]
    started = time.time()
    with (run_dir / OUTPUT).open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # Ctrl-C in a terminal also reaches the child; a signal to this process alone does not.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.terminate()
            process.wait()
            raise
    return Ended(code, started, time.time() - started)


def last_line(run_dir: Path, code: int) -> str:
    """Returns the exit code and the last line of the output, for a run without an outcome."""
    try:
        text = (run_dir / OUTPUT).read_text(encoding="utf8", errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"exit code {code}: {(lines or ['nothing printed'])[-1][:300]}"
