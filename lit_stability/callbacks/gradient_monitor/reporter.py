"""Reports incidents to the console, the record and the loggers. May import Lightning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from lit_stability.callbacks.gradient_monitor.step_history_writer import StepHistoryWriter
from lit_stability.incidents import Incident
from lit_stability.incidents.log import IncidentRecord
from lit_stability.incidents.report import closing_line, opening_line, summary_table
from lit_stability.incidents.step_history import StepHistory
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import Trainer
from lit_stability.loggers.writer import StabilityWriter
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import guarded
from lit_stability.trainer_internals import logger_step, run_directory

log = suite_logger()

_MOST_LINES = 1000
"""Lines of the record that are kept while it cannot be written."""
_ADVICE = "give the Trainer a default_root_dir, or its logger a save_dir, that is writable"


def only_warnings(record: logging.LogRecord) -> bool:
    """Filters the log of ranks other than the first."""
    return record.levelno >= logging.WARNING


class Reporter:
    """Reports each thing once, from rank 0.

    Args:
        trainer: whose loggers and folder to use; a ``fast_dev_run`` leaves no record.
        history: counts the step attempts of the run.
        run: id of the run, for the record of each incident.
        uploads: whether loggers that take files get the folders of incidents.
    """

    def __init__(
        self, trainer: Trainer, history: StepHistory, run: str, *, uploads: bool = False
    ) -> None:
        self._trainer, self.run, self._uploads = trainer, run, uploads
        self._incidents: list[Incident] = []
        """Incidents of this fit."""
        self._closed: list[Incident] = []
        """Incidents whose folder is uploaded later: other callbacks may still write to it."""
        self.history = StepHistoryWriter(trainer, history)
        if not trainer.is_global_zero:
            log.addFilter(only_warnings)
        self._writer = StabilityWriter(trainer.loggers)
        self._overflows = 0
        self._searching = True
        """Whether the loss scaler has not had a finite step yet."""
        self._unwritten: list[dict[str, Any]] = []
        """Lines of the record that could not be written yet."""
        directory = run_directory(trainer)
        self._record = None if directory is None else IncidentRecord(directory / "incidents.jsonl")

    @property
    def record_path(self) -> str | None:
        """Path of the file in which incidents are recorded."""
        return None if self._record is None else str(self._record.path)

    def step(self, stats: StepStats, incidents: int) -> None:
        """Writes the scalars of an accepted step to the loggers."""
        overflows = None if stats.loss_scale is None else self._overflows
        self._writer.write_stats(stats, incidents, logger_step(self._trainer), overflows)
        self.history.write_current()

    def accepted(self, stats: StepStats) -> None:
        """Writes what probes measured in an accepted step, and counts the scaler's overflows."""
        if self._closed:
            self._upload()
        if stats.readings:
            self._writer.write_readings(stats, logger_step(self._trainer))
        self._follow_scaler(stats)

    def _follow_scaler(self, stats: StepStats) -> None:
        """Count the steps that the loss scaler skips, and log when its first search is over.

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
                self.log_line(
                    f"step {stats.step}: the loss scaler skipped {self._overflows} steps, as is "
                    f"usual at the start, and found its scale: {stats.loss_scale:g}"
                )

    def opened(self, incident: Incident) -> None:
        """Reports an incident that was opened, and the response to it."""
        self._incidents.append(incident)
        self.log_line(opening_line(incident))
        self._write("open", incident, opened=True)
        self.history.incident_changed(incident)

    def closed(self, incident: Incident) -> None:
        """Reports an incident that was closed, and its outcome."""
        self.log_line(closing_line(incident))
        self._write("close", incident)
        self.history.incident_changed(incident)
        if self._uploads:
            self._closed.append(incident)

    def amended(self, incident: Incident) -> None:
        """Records another outcome of an incident that is closed."""
        self._write("close", incident)
        self.history.incident_changed(incident)

    def ends_with(self, bad: Sequence[str]) -> None:
        """Reports weights and buffers that are non-finite at the end of the fit, if any are."""
        if bad:
            self.log_line(f"the fit ends with non-finite weights, first {bad[0]}")

    def saved_with(self, bad: Sequence[str]) -> None:
        """Reports non-finite weights and buffers in a checkpoint, if there are any."""
        if bad:
            self.log_line(
                f"a checkpoint saved at step {self._trainer.global_step} has non-finite weights, "
                f"first {bad[0]}: do not resume from it"
            )

    def end(self, incidents: Sequence[Incident]) -> None:
        """Prints the summary of a fit that had incidents; nothing is reported after it."""
        self.history.end()
        self._write_lines()
        if self._trainer.is_global_zero:
            self._upload()
            self._writer.end(self._incidents, logger_step(self._trainer))
        if incidents:
            self.log_line("\n".join(["stability summary", *summary_table(incidents)]))

    def log_line(self, line: str) -> None:
        """Logs a line on rank 0."""
        if self._trainer.is_global_zero:
            log.info(line)

    def _upload(self) -> None:
        """Uploads the folders of incidents that were closed before the last step."""
        for incident in self._closed:
            self._writer.upload(incident)
        self._closed = []

    def _write(
        self, event: Literal["open", "close"], incident: Incident, *, opened: bool = False
    ) -> None:
        if not self._trainer.is_global_zero:
            return
        step = logger_step(self._trainer)
        self._writer.write_incident(incident, self._incidents, step, opened=opened)
        if self._record is not None:
            self._unwritten.append(self._record.line(event, incident))
            self._write_lines()

    def _write_lines(self) -> None:
        """Writes the lines of the record that are left, also those that failed before."""
        if self._record is None or not self._unwritten:
            return
        record, lines = self._record, self._unwritten[-_MOST_LINES:]
        what = f"incidents cannot be recorded in {record.path}"
        if guarded(self, what, lambda: record.append_lines(lines), _ADVICE):
            self._unwritten = []
