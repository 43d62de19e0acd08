"""What people see of an incident: console, record, loggers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import Trainer

from lit_stability.callbacks.gradient_monitor.step_history_writer import StepHistoryWriter
from lit_stability.incidents import Incident
from lit_stability.incidents.log import IncidentRecord
from lit_stability.incidents.report import closing_line, opening_line, summary_table
from lit_stability.incidents.step_history import StepHistory
from lit_stability.measurement.step_stats import StepStats
from lit_stability.tensorboard.scalar_writer import StabilityWriter
from lit_stability.trainer_internals import logger_step, run_directory

log = logging.getLogger("lightning.pytorch.lit_stability")


def only_warnings(record: logging.LogRecord) -> bool:
    """A filter for the log of ranks other than the first."""
    return record.levelno >= logging.WARNING


class Reporter:
    """Tells each thing once, from rank zero.

    Args:
        trainer: whose loggers and folder to use; a ``fast_dev_run`` leaves no record.
        attempts: what counts the attempts at steps.
    """

    def __init__(self, trainer: Trainer, history: StepHistory) -> None:
        self._trainer = trainer
        self.history = StepHistoryWriter(trainer, history)
        if not trainer.is_global_zero:
            log.addFilter(only_warnings)
        self._writer = StabilityWriter(trainer.loggers)
        self._overflows = 0
        self._searching = True
        self._writable = True
        directory = run_directory(trainer)
        self._record = None if directory is None else IncidentRecord(directory / "incidents.jsonl")

    @property
    def record_path(self) -> str | None:
        """Where incidents are recorded."""
        return None if self._record is None else str(self._record.path)

    def step(self, stats: StepStats, incidents: int) -> None:
        """Write an accepted step's scalars to the loggers."""
        overflows = None if stats.loss_scale is None else self._overflows
        self._writer.write_stats(stats, incidents, logger_step(self._trainer), overflows)
        self.history.due()

    def accepted(self, stats: StepStats) -> None:
        """Write what probes have measured on an accepted step, and follow the loss scaler."""
        if stats.readings:
            self._writer.write_readings(stats, logger_step(self._trainer))
        self._follow_scaler(stats)

    def _follow_scaler(self, stats: StepStats) -> None:
        """Count the steps that the loss scaler leaves out, and tell when its first search is over.

        Args:
            stats: of an accepted step, in fp16 or not.
        """
        if stats.loss_scale is None:
            return
        if not stats.finite_gradients:
            self._overflows += 1
        elif self._searching:
            self._searching = False
            if self._overflows:
                self.say(
                    f"step {stats.step}: the loss scaler left {self._overflows} steps out, as is "
                    f"usual at the start, and found its scale: {stats.loss_scale:g}"
                )

    def opened(self, incident: Incident) -> None:
        """Tell that an incident has opened, and what is done about it."""
        self.say(opening_line(incident))
        self._write("open", incident)
        self.history.told(incident)

    def closed(self, incident: Incident) -> None:
        """Tell how it ended."""
        self.say(closing_line(incident))
        self._write("close", incident)
        self.history.told(incident)

    def ends_with(self, bad: Sequence[str]) -> None:
        """Tell of weights that are non-finite at the end, if there are any."""
        if bad:
            self.say(f"the fit ends with non-finite weights, first {bad[0]}")

    def saved_with(self, bad: Sequence[str]) -> None:
        """Tell of non-finite weights in a checkpoint, if there are any."""
        if bad:
            self.say(
                f"a checkpoint saved at step {self._trainer.global_step} holds non-finite weights, "
                f"first {bad[0]}: do not go on from it"
            )

    def end(self, incidents: Sequence[Incident]) -> None:
        """Tell of all incidents of a fit, if there were any; nothing comes after it."""
        self.history.end()
        if incidents:
            self.say("\n".join(["stability summary", *summary_table(incidents)]))

    def say(self, line: str) -> None:
        """A line on the console."""
        if self._trainer.is_global_zero:
            log.info(line)

    def _write(self, event: Literal["open", "close"], incident: Incident) -> None:
        if not self._trainer.is_global_zero:
            return
        self._writer.write_incident(incident, logger_step(self._trainer))
        if self._record is None:
            return
        try:
            self._record.append(event, incident)
        except OSError as error:
            if self._writable:
                log.warning(
                    "an incident cannot be recorded in %s (%s); training goes on, this is told "
                    "once; give the Trainer a default_root_dir, or its logger a save_dir, that can "
                    "be written",
                    self._record.path,
                    error,
                )
            self._writable = False
