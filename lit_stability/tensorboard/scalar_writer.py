"""Writes scalars and incidents to the trainer's loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from lit_stability.incidents import Incident
from lit_stability.incidents.report import markdown
from lit_stability.lightning_choice import suite_logger
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import to_each
from lit_stability.tensorboard.size_limits import MIB, TEXTS, SizeLimit, bytes_of

log = suite_logger()


class StabilityWriter:
    """Writes to the loggers directly, at a tenth of the cost of ``self.log`` per key.

    Args:
        loggers: Lightning's loggers, any number of them.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self._loggers = list(loggers)
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
        }
        self._log_metrics(metrics, step)

    def _log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        to_each(self._loggers, lambda logger: logger.log_metrics(metrics, step=step))

    def write_incident(self, incident: Incident, step: int) -> None:
        """Writes an incident as markdown to each logger that accepts text (TensorBoard, wandb).

        Texts are limited, see `lit_stability.tensorboard.size_limits`; the one of an incident that
        stops the fit is always written.
        """
        name, text = f"stability/incident_{incident.id}", markdown(incident)
        if not self._texts.take(bytes_of(text)) and incident.outcome != "stopped":
            self._log_full()
            return

        def write(logger: Any) -> None:
            experiment: Any = getattr(logger, "experiment", None)
            if callable(getattr(experiment, "add_text", None)):
                experiment.add_text(name, text, step)
                experiment.flush()
            elif _takes_tables(logger):
                logger.log_text(key=name, columns=["incident"], data=[[text]], step=step)

        to_each(self._loggers, write)

    def _log_full(self) -> None:
        if not self._full:
            self._full = True
            log.warning(
                "the incidents of this fit have filled %d MiB of text; loggers get no more of it, "
                "incidents.jsonl has all",
                TEXTS // MIB,
            )


def _takes_tables(logger: Any) -> bool:
    """Returns whether a logger's ``log_text`` accepts rows, as that of `WandbLogger` does."""
    log_text = getattr(logger, "log_text", None)
    return callable(log_text) and {"columns", "data", "step"} <= {*signature(log_text).parameters}
