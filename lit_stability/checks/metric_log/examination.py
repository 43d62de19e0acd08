"""Examines a metric log: chooses its metrics, runs the checks and collects the findings.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math

from lit_stability.checks.finding import worst_first
from lit_stability.checks.metric_log.loss_findings import loss_findings
from lit_stability.checks.metric_log.progress_findings import progress_findings
from lit_stability.checks.metric_log.report import LogFinding, LogReport, SeriesSummary
from lit_stability.checks.metric_log.roles import NoLossError, Roles, choose_roles
from lit_stability.checks.metric_log.series import MetricLog, Series
from lit_stability.checks.metric_log.signal_findings import signal_findings
from lit_stability.checks.metric_log.timeline import Timeline


def examine_log(log: MetricLog, loss: str | None = None) -> LogReport:
    """Examines the log of a run.

    Args:
        log: As a reader returned it.
        loss: Name of the training loss; by default chosen by name.

    Raises:
        NoLossError: If there is no series of that name, or none that looks like a training loss.

    >>> from pathlib import Path
    >>> log = MetricLog("CSV", Path("metrics.csv"), ())
    >>> for step in range(30):
    ...     log.add("train_loss", step, 2.0 if step < 20 else math.nan)
    >>> report = examine_log(log)
    >>> report.healthy, report.findings[0].what
    (False, 'non-finite loss at step 20')
    """
    roles = choose_roles(log, loss)
    if not len(roles.loss):
        raise NoLossError(f"{roles.loss.name} has no points")
    timeline = Timeline(roles)
    findings: list[LogFinding] = [
        *loss_findings(log, timeline),
        *signal_findings(timeline),
        *progress_findings(log, timeline),
    ]
    ordered = [finding for finding in worst_first(findings) if isinstance(finding, LogFinding)]
    return LogReport(
        format=log.format,
        path=str(log.path),
        files=tuple(map(str, log.files)),
        used=_used(roles),
        first_step=roles.loss.steps[0],
        last_step=roles.loss.steps[-1],
        points=len(roles.loss),
        last_written=_last_written(log),
        complete=log.complete,
        planned_steps=log.planned_steps,
        problems=tuple(log.problems),
        findings=tuple(ordered),
        series=tuple(_summary(log.series[name]) for name in sorted(log.series)),
    )


def _used(roles: Roles) -> dict[str, tuple[str, ...]]:
    used = {
        "loss": (roles.loss,),
        "validation loss": (roles.validation_loss,),
        "gradient norm": (roles.gradient_norm,),
        "learning rate": roles.learning_rates,
        "loss scale": (roles.loss_scale,),
    }
    named = {role: tuple(s.name for s in found if s is not None) for role, found in used.items()}
    return {role: names for role, names in named.items() if names}


def _last_written(log: MetricLog) -> float:
    times = [s.times[-1] for s in log.series.values() if len(s) and math.isfinite(s.times[-1])]
    return max(times) if times else max((f.stat().st_mtime for f in log.files), default=math.nan)


def _summary(series: Series) -> SeriesSummary:
    finite = [value for value in series.values if math.isfinite(value)]
    return SeriesSummary(
        name=series.name,
        points=len(series),
        first_step=series.steps[0],
        last_step=series.steps[-1],
        minimum=min(finite, default=math.nan),
        last=series.values[-1],
        non_finite=len(series) - len(finite),
    )
