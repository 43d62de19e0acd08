"""Writes the outcome of a run to its folder, and compares it with the expectation.

May import Lightning.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_stability.callbacks.preflight import Preflight
from lit_stability.checks.preflight import PreflightError, Report
from lit_stability.cli.experiments.expectation import End, Expectation
from lit_stability.cli.experiments.judgement import judge, summary
from lit_stability.cli.experiments.outcome import Ending, Outcome, incidents_since, write_outcome
from lit_stability.incidents import TrainingStopped
from lit_stability.lightning_package import SIGTERMException, Trainer
from lit_stability.trainer_internals import callbacks_of


def is_interrupt(error: BaseException) -> bool:
    """Returns whether a run ended with Ctrl-C or SIGTERM.

    For Ctrl-C Lightning raises SystemExit while it handles the KeyboardInterrupt.
    """
    causes = (error, error.__context__)
    return any(isinstance(each, (KeyboardInterrupt, SIGTERMException)) for each in causes)


class Closing:
    """Closes a run that finished or ended with an exception; writes on rank zero only.

    Args:
        run_dir: folder for everything that the run writes.
        expect: the expected result, or None.
        latest: returns the current or last trainer, or None if it no longer exists.
    """

    def __init__(
        self, run_dir: Path, expect: Expectation | None, latest: Callable[[], Trainer | None]
    ) -> None:
        self._run_dir, self._expect, self._latest = run_dir, expect, latest
        self._started = time.time()

    def finished(self, metrics: Mapping[str, float]) -> None:
        """Writes and prints the metrics of a finished run, and prints the verdict.

        Args:
            metrics: metrics of the fit, overridden by those of the evaluation.
        """
        trainer = self._latest()
        if trainer is None or not trainer.is_global_zero:
            return
        print("".join(f"{key} {value:.6g}\n" for key, value in sorted(metrics.items())), end="")
        self._close("finished", "", metrics, _report_of(trainer))

    def failed(self, error: BaseException) -> None:
        """Writes the outcome of a run that ended with an exception, and prints the verdict."""
        trainer = self._latest()
        if trainer is None:  # a recovery that gave up keeps no trainer
            self._close(_end_by(error), f"{type(error).__name__}: {error}", {}, None)
        elif trainer.is_global_zero:
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            report = error.report if isinstance(error, PreflightError) else _report_of(trainer)
            self._close(_end_by(error), f"{type(error).__name__}: {error}", metrics, report)

    def _close(
        self, ends: End, why: str, metrics: Mapping[str, float], report: Report | None
    ) -> None:
        seconds = round(time.time() - self._started, 3)
        ending = Ending(ends=ends, started=self._started, seconds=seconds, why=why)
        outcome = Outcome(
            ending=ending,
            metrics=metrics,
            incidents=incidents_since(self._run_dir, self._started),
            preflight=None if report is None else report.as_dict(),
        )
        write_outcome(self._run_dir, outcome)
        print(f"tensorboard --logdir {shlex.quote(str(self._run_dir))}")
        if self._expect is not None:
            print(summary(judge(self._expect, outcome)))


def _end_by(error: BaseException) -> End:
    if is_interrupt(error):
        return "interrupted"
    return "stopped" if isinstance(error, (TrainingStopped, PreflightError)) else "failed"


def _report_of(trainer: Trainer) -> Report | None:
    found: list[Any] = [each for each in callbacks_of(trainer) if isinstance(each, Preflight)]
    return found[0].report if found else None
