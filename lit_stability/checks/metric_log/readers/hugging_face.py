"""Reads ``trainer_state.json``, which the Trainer of Hugging Face writes into each checkpoint.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_stability.checks.metric_log.series import MetricLog, number_of

NAME = "Hugging Face"
FILE = "trainer_state.json"
_SUMMARY = "train_runtime"
"""Key of the last row, which has means over the whole run; it is written when the run ends."""
_NOT_METRICS = ("step", "total_flos")


def accepts(file: Path) -> bool:
    """Returns whether the file has the name of a state; a copy of it may be named otherwise."""
    return file.name == FILE or (file.suffix == ".json" and "trainer_state" in file.name)


def run_of(file: Path) -> Path:
    """Returns the folder of the run that a state belongs to.

    >>> str(run_of(Path("out/checkpoint-500/trainer_state.json")))
    'out'
    """
    return file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent


def newest(files: Sequence[Path]) -> Path:
    """Returns the state with the most steps: that of the run itself, or of its last checkpoint."""

    def steps(file: Path) -> tuple[bool, int]:
        number = re.fullmatch(r"checkpoint-(\d+)", file.parent.name)
        return number is None, int(number[1]) if number else 0

    return max(files, key=steps)


def read(files: Sequence[Path]) -> MetricLog:
    """Reads the rows of one state: training, evaluation and the summary, recognised by their keys.

    Of a truncated file, the rows before the damage are read.

    Args:
        files: One state.
    """
    (file,) = files
    log = MetricLog(NAME, file, (file,), complete=False, hides_nan=True)

    def take(row: dict[str, Any]) -> Any:
        """Takes a row of the history as soon as it is parsed, so that no list of rows is built."""
        if "step" not in row or "log_history" in row:
            return row
        step = number_of(row["step"])
        if _SUMMARY in row:
            log.complete = True
        elif step is not None:
            for name, given in row.items():
                value = number_of(given)
                if value is not None and name not in _NOT_METRICS:
                    log.add(name, int(step), value)
        return None

    try:
        state = json.loads(file.read_text(encoding="utf8", errors="replace"), object_hook=take)
    except (json.JSONDecodeError, RecursionError) as error:
        log.problems.append(f"truncated or damaged; the rows before it were read ({error})")
        log.complete = None
        return log
    if not isinstance(state, dict) or "log_history" not in state:
        log.problems.append("has no log_history, so it is no state of a Trainer")
        return log
    planned, done = number_of(state.get("max_steps")), number_of(state.get("global_step"))
    if planned is not None and planned > 0:
        log.planned_steps = int(planned)
        log.complete = bool(log.complete) or (done is not None and done >= planned)
    return log
