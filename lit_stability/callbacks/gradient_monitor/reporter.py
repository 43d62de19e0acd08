"""Reports incidents to the console, the record and the loggers. May import Lightning."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_stability.callbacks.gradient_monitor.step_history_writer import StepHistoryWriter
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.console import rich_draws, show_card
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.incidents.card import IncidentCard
from lit_stability.incidents.console_lines import (
    cause_line,
    cause_text,
    closing_line,
    continued_line,
    opening_lines,
    short_path,
    summary,
    verb_of,
)
from lit_stability.incidents.log import IncidentRecord
from lit_stability.incidents.step_history import StepHistory
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, SIGTERMException, Trainer
from lit_stability.loggers.writer import StabilityWriter
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import guarded
from lit_stability.policies.actions import Stop
from lit_stability.tensorboard.tags import RunState
from lit_stability.trainer_internals import (
    adapter_of,
    callbacks_of,
    logger_step,
    parameters_of,
    run_directory,
)

log = suite_logger()

_MOST_LINES = 1000
"""Lines of the record that are kept while it cannot be written."""
_ADVICE = "give the Trainer a default_root_dir, or its logger a save_dir, that is writable"


def only_warnings(record: logging.LogRecord) -> bool:
    """Filters the log of ranks other than the first."""
    return record.levelno >= logging.WARNING


def _ending(exception: BaseException | None) -> RunState:
    """Returns how a fit ended."""
    if exception is None:
        return "finished"
    if isinstance(exception, TrainingStopped):
        return "stopped"
    signalled = isinstance(exception, (KeyboardInterrupt, SystemExit, SIGTERMException))
    return "interrupted" if signalled else "failed"


@dataclass
class _Shown:
    """What the console shows of the open incident."""

    cause: str
    verbs: set[str]
    """Kinds of responses."""


def stop_bar_of_rich(trainer: Trainer) -> None:
    """Stops a RichProgressBar that is drawn; Lightning does so itself at the end of the same hook.

    That of tqdm is closed earlier.
    """
    progress = getattr(trainer.progress_bar_callback, "progress", None)
    if progress is not None and rich_draws():
        progress.stop()


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
        self._started = False
        self._cards: dict[int, IncidentCard] = {}
        self._shown = _Shown("", set())
        directory = run_directory(trainer)
        self._record = None if directory is None else IncidentRecord(directory / "incidents.jsonl")

    @property
    def record_path(self) -> str | None:
        """Path of the file in which incidents are recorded."""
        return None if self._record is None else str(self._record.path)

    def started(self, pl_module: LightningModule) -> None:
        """Logs once what is watched, what the suite keeps in memory and where files go."""
        if self._started:
            return
        self._started = True
        if self._trainer.is_global_zero:
            self.log_line("; ".join(filter(None, self._startup_texts(pl_module))))

    def _startup_texts(self, pl_module: LightningModule) -> Iterator[str]:
        numel = sum(p.numel() for o in self._trainer.optimizers for p in parameters_of(o))
        parts = adapter_of(self._trainer).part_shares(pl_module) is not None
        where = " on rank 0" if parts else ""
        yield f"watching {type(pl_module).__name__}, {numel:,} parameters{where}"
        for each in callbacks_of(self._trainer):
            if isinstance(each, StabilityCallback):
                yield each.startup_text(self._trainer, pl_module)
        if self._record is not None:
            yield f"files in {short_path(str(self._record.path.parent))}"

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

    def opened(self, incident: Incident, alike: Incident | None = None) -> None:
        """Reports an incident that was opened, and the response to it.

        Args:
            incident: that was opened.
            alike: the first incident of the fit with the same cause, if there is one.
        """
        self._incidents.append(incident)
        self._shown = _Shown(cause_text(incident), {verb_of(r) for r in incident.responses})
        self.log_line(opening_lines(incident, alike), incident)
        self._write("open", incident, opened=True)
        self.history.incident_changed(incident)

    def continued(self, incident: Incident) -> None:
        """Reports a response to an open incident that is the first of its kind, and a new cause.

        Equal responses are counted, and reported when the incident closes.
        """
        verbs = {verb_of(each): each for each in incident.responses}
        new = [each for verb, each in verbs.items() if verb not in self._shown.verbs]
        self._shown.verbs.update(verbs)
        if new and not isinstance(incident.response, Stop):
            self.log_line(continued_line(incident, new), incident)
        self._report_cause(incident)

    def _report_cause(self, incident: Incident) -> None:
        cause, before = cause_text(incident), self._shown.cause
        if cause != before:
            self._shown.cause = cause
            self.log_line(cause_line(incident, before), incident)

    def closed(self, incident: Incident) -> None:
        """Reports an incident that was closed, and its outcome."""
        self.log_line(closing_line(incident), incident)
        self._write("close", incident)
        self.history.incident_changed(incident)
        if self._uploads:
            self._closed.append(incident)

    def amended(self, incident: Incident) -> None:
        """Records another outcome of an incident that is closed, and reports a better one."""
        if incident.outcome == "recovered":
            self.log_line(closing_line(incident), incident)
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

    def end(self, exception: BaseException | None = None) -> None:
        """Writes the rest of the history of step attempts.

        Args:
            exception: in which the fit ended; None if it finished.
        """
        self.history.end(_ending(exception))
        self._write_lines()
        if self._trainer.is_global_zero:
            self._upload()
            self._writer.end(self._incidents, logger_step(self._trainer))

    def print_summary(self, incidents: Sequence[Incident]) -> None:
        """Prints the summary of a fit that had incidents, below its progress bar."""
        if incidents:
            stop_bar_of_rich(self._trainer)
            self.log_line(summary(incidents))

    def log_line(self, line: str, incident: Incident | None = None) -> None:
        """Logs a line on rank 0.

        Args:
            line: to log.
            incident: whose card shows the same in a notebook; None for what is no incident.
        """
        if self._trainer.is_global_zero:
            log.info(line, extra=None if incident is None else show_card(self._card_of(incident)))

    def _card_of(self, incident: Incident) -> IncidentCard:
        return self._cards.setdefault(incident.id, IncidentCard(incident))

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
        del self._unwritten[:-_MOST_LINES]
        record, lines = self._record, self._unwritten
        what = f"incidents cannot be recorded in {record.path}"
        if guarded(self, what, lambda: record.append_lines(lines), _ADVICE):
            self._unwritten = []
