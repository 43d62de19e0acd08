"""Examines the metric log of a run, written by any logger, with the suite attached or without it.

    path      --find_logs--> readers and their files, one for each run
    files     --read--> MetricLog: series by name
    MetricLog --examine_log--> LogReport: the metrics used, the findings with step and causes
    LogReport --format_log_report--> text

Imports neither torch nor Lightning.
"""

from lit_stability.checks.metric_log.examination import examine_log
from lit_stability.checks.metric_log.readers import LogReader, find_logs
from lit_stability.checks.metric_log.report import LogFinding, LogReport
from lit_stability.checks.metric_log.roles import NoLossError
from lit_stability.checks.metric_log.series import MetricLog, Series
from lit_stability.checks.metric_log.text import format_log_report

__all__ = [
    "LogFinding",
    "LogReader",
    "LogReport",
    "MetricLog",
    "NoLossError",
    "Series",
    "examine_log",
    "find_logs",
    "format_log_report",
]
