"""Writes scalars and incidents to the trainer's loggers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_stability.background import Background
from lit_stability.incidents import Incident
from lit_stability.incidents.report import markdown
from lit_stability.lightning_choice import suite_logger
from lit_stability.loggers import LoggerAdapter, adapter_of
from lit_stability.loggers.rows import row_of, status_of
from lit_stability.loggers.size_limits import MIB, TEXTS, SizeLimit, bytes_of
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import to_each

log = suite_logger()

_MOST_ROWS = 1000
"""Rows of a table; the newest."""
_FEW, _EVERY = 100, 60.0
"""With more incidents than a few, seconds between tables, of which each has all rows."""
_SECONDS_AT_END = 10.0
"""How long the end of a fit waits for loggers that ask a network."""


class StabilityWriter:
    """Writes to the loggers directly, at a tenth of the cost of ``self.log`` per key.

    Args:
        loggers: Lightning's loggers, any number of them.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self._loggers = list(loggers)
        self._adapters: dict[int, LoggerAdapter] = {}
        """The adapter of each logger, by its id."""
        self._table_written = -math.inf
        """When a table was written last, in seconds of the monotonic clock."""
        self._background = Background("incidents for loggers")
        self._texts = SizeLimit(TEXTS)
        self._full = False
        """Whether it was logged that no more incidents are written as text."""

    def write_stats(
        self, stats: StepStats, incidents: int, step: int, overflows: int | None = None
    ) -> None:
        """Writes the ``stability/*`` scalars that `GradientMonitor` documents.

        Args:
            stats: the measurement of an accepted step.
            incidents: number of incidents so far.
            step: the loggers' own step, which never decreases.
            overflows: number of steps that the loss scaler skipped; None without a loss scaler.
        """
        suffix = f"_{stats.optimizer}" if stats.optimizer else ""
        rates = (
            max(stats.learning_rates, default=0.0),
            max(stats.nominal_learning_rates, default=0.0),
        )
        scalars = {
            "grad_norm": stats.grad_norm,
            "update_ratio": stats.update_ratio,
            "learning_rate": rates[0],
            "learning_rate_factor": rates[0] / rates[1] if rates[1] else 1.0,
            "loss_scale": stats.loss_scale,
            "overflows": overflows,
            "stuck_share": stats.stuck_share,
            "incidents": float(incidents),
        }
        metrics = {f"stability/{k}{suffix}": v for k, v in scalars.items() if v is not None}
        self._log_metrics(metrics, step)

    def write_readings(self, stats: StepStats, step: int) -> None:
        """Writes the readings of probes, one scalar per location in the model.

        Args:
            stats: the measurement of the step, with the readings.
            step: the loggers' own step.
        """
        metrics = {
            "/".join(filter(None, ("stability", r.quantity, r.where))): r.value
            for r in stats.readings
            if r.logged
        }
        self._log_metrics(metrics, step)

    def _log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        to_each(self._loggers, lambda logger: logger.log_metrics(metrics, step=step))

    def write_incident(
        self, incident: Incident, incidents: Sequence[Incident], step: int, *, opened: bool = False
    ) -> None:
        """Writes an incident that was opened, was closed or has changed.

        Reports are limited, see `lit_stability.loggers.size_limits`; the one of an incident
        that stops the fit is always written.

        Args:
            incident: the incident.
            incidents: all of the fit, for the table.
            step: the loggers' own step.
            opened: whether it was opened now.
        """
        report = markdown(incident)
        if self._texts.take(bytes_of(report)) or incident.outcome == "stopped":
            self._each(lambda adapter: adapter.text(incident, report, step))
        else:
            self._log_full()
        self._write_table(incidents, step)
        if opened:
            title = f"Training incident: {incident.first.kind}"
            self._alert(incident, title, urgent=False)
        elif incident.outcome == "stopped":
            self._alert(incident, "Training stopped", urgent=True)

    def upload(self, incident: Incident) -> None:
        """Uploads the folder of an incident to the loggers that take files."""
        if incident.path is not None and not incident.pruned:
            self._each(lambda adapter: adapter.upload(incident))

    def end(self, incidents: Sequence[Incident], step: int) -> None:
        """Writes the table for the last time, and waits some seconds for the network."""
        if incidents:
            self._write_table(incidents, step, last=True)
            self._background.close(_SECONDS_AT_END)

    def _write_table(self, incidents: Sequence[Incident], step: int, *, last: bool = False) -> None:
        now = time.monotonic()
        rare = len(incidents) > _FEW and now - self._table_written < _EVERY
        if rare and not last:
            return
        self._table_written = now
        rows = [row_of(each) for each in incidents[-_MOST_ROWS:]]
        values = status_of(incidents)
        self._each(lambda adapter: adapter.table(rows, step, last=last))
        self._each(lambda adapter: adapter.status(values))

    def _alert(self, incident: Incident, title: str, *, urgent: bool) -> None:
        first = incident.first
        text = f"step {first.step}: {first.message}. What to try: {incident.remedy}"
        self._each(lambda adapter: adapter.alert(title, text, urgent=urgent))

    def _each(self, write: Callable[[LoggerAdapter], object]) -> None:
        def write_to(logger: Any) -> None:
            key = id(logger)
            if key not in self._adapters:
                self._adapters[key] = adapter_of(logger, self._background)
            write(self._adapters[key])

        to_each(self._loggers, write_to, "incidents")

    def _log_full(self) -> None:
        if not self._full:
            self._full = True
            log.warning(
                "the incidents of this fit have filled %d MiB of text; loggers get no more of it, "
                "incidents.jsonl has all",
                TEXTS // MIB,
            )
