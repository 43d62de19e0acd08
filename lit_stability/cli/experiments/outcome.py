"""The outcome of a run, as files in its folder for users and for the expectation check.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from lit_stability.cli.experiments.expectation import End
from lit_stability.incidents.log import read_incidents
from lit_stability.lightning_choice import suite_logger
from lit_stability.redaction import redacted_tree
from lit_stability.training_state.atomic_write import write_and_keep

log = suite_logger()

FILE = "outcome.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ended, as recorded in ``outcome.json``."""

    ends: End
    started: float
    """Unix time of the start, in s; earlier incidents belong to another run in the same folder."""
    seconds: float
    """Wall-clock time from start to end, in s."""
    why: str = ""
    """The exception that ended the run, if any."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that an expectation is compared with."""

    ending: Ending
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of each metric; NaN if it is not finite."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """Incidents of this run, in the format of `read_incidents`."""
    preflight: dict[str, Any] | None = None
    """The report in the format of `Report.as_dict`; None if no `Preflight` ran."""

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """Reads the outcome of a run; returns None if it wrote no `Ending`, e.g. if it was killed.

        Args:
            folder: the ``run_dir`` of the run.

        Raises:
            ValueError: if a file is damaged or has another format version.
        """
        if not (folder / FILE).is_file():
            return None
        raw = _read(folder / FILE)
        ending = Ending(**{name: raw[name] for name in Ending.__dataclass_fields__})
        metrics = raw["metrics"].items()
        return cls(
            ending=ending,
            metrics={key: math.nan if each is None else float(each) for key, each in metrics},
            incidents=incidents_since(folder, ending.started),
            preflight=_read_preflight(folder / "preflight.json"),
        )


def incidents_since(folder: Path, started: float) -> list[dict[str, Any]]:
    """Returns the recorded incidents below a folder since a run was started.

    A damaged record, which may belong to an earlier run, is logged and ignored.

    Args:
        folder: searched with its subfolders, because a logger may use one of its own.
        started: Unix time of the start, in s.
    """
    found = [each for file in folder.rglob("incidents.jsonl") for each in _incidents(file)]
    return [each for each in found if each["time"] >= started]


def _incidents(file: Path) -> list[dict[str, Any]]:
    try:
        return read_incidents(file)
    except (OSError, ValueError) as error:
        log.warning("%s; its incidents are not counted", error)
        return []


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes the files for `Outcome.read`, except the incidents, which the run has recorded.

    Files of an earlier run are renamed and kept. ``metrics.json`` is written for finished runs
    only.

    Args:
        folder: the ``run_dir`` of the run.
        outcome: the outcome; non-finite metrics become null in the files.
    """
    finite = {key: each if math.isfinite(each) else None for key, each in outcome.metrics.items()}
    finite = dict(sorted(finite.items()))
    if outcome.ending.ends == "finished":
        _write(folder / "metrics.json", finite)
    if outcome.preflight is not None or (folder / "preflight.json").exists():
        _write(folder / "preflight.json", outcome.preflight)
    _write(folder / FILE, {"version": _VERSION, **asdict(outcome.ending), "metrics": finite})


def _write(file: Path, value: Any) -> None:
    # The reason of a failure may quote anything, also a value of the environment.
    write_and_keep(file, json.dumps(redacted_tree(value), indent=2) + "\n")


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); run the experiment again") from error


def _read(file: Path) -> dict[str, Any]:
    raw = _load(file)
    version = raw.get("version") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or version != _VERSION:
        raise ValueError(
            f"{file}: has version {version!r}, expected {_VERSION}; run the experiment again"
        )
    for key, check in _FIELDS.items():
        if not check(raw.get(key)):
            problem = f"{key} is missing" if key not in raw else f"{key} has the wrong type"
            raise ValueError(f"{file}: is damaged, {problem}; run the experiment again")
    return raw


def _read_preflight(file: Path) -> dict[str, Any] | None:
    report: dict[str, Any] | None = _load(file)
    if report is not None and not _is_report(report):
        raise ValueError(f"{file}: is damaged, not a preflight report; run the experiment again")
    return report


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(v is None or _is_number(v) for v in value.values())


def _is_report(value: Any) -> bool:
    findings = value.get("findings") if isinstance(value, dict) else None
    return isinstance(findings, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in _FINDING)
        for each in findings
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "ends": lambda value: value in get_args(End),
    "started": _is_number,
    "seconds": _is_number,
    "why": lambda value: isinstance(value, str),
    "metrics": _is_metrics,
}
_FINDING = ("severity", "check", "what")
