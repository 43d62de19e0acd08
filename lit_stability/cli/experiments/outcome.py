"""What a run leaves of itself in its folder, for people and for the judge of its expectation.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_stability.cli.experiments.expectation import End
from lit_stability.incidents.log import read_incidents
from lit_stability.training_state.atomic_write import write_and_keep

FILE = "outcome.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run came to its end, as ``outcome.json`` says."""

    ends: End
    started: float
    """Unix time at which the run began, s; incidents from before are those of an earlier run."""
    seconds: float
    """Wall-clock time from there to the end."""
    why: str = ""
    """The exception that ended it, where there was one."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that an expectation is judged by."""

    ending: Ending
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last of each name; NaN for what is not finite."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """As `read_incidents` gives them, of this run only."""
    preflight: dict[str, Any] | None = None
    """The report as `Report.as_dict` gives it; None where no `Preflight` ran."""

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """Read what a run has left, or None where it left no `Ending`, as when it was killed.

        Args:
            folder: its ``run_dir``.

        Raises:
            ValueError: a file there is damaged or was written by a newer version.
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
            preflight=_load(folder / "preflight.json"),
        )


def incidents_since(folder: Path, started: float) -> list[dict[str, Any]]:
    """The incidents in the records below a folder, of a run that began at a time.

    Args:
        folder: searched whole, as a logger may have a folder of its own there.
        started: Unix time, s.
    """
    found = [each for file in folder.rglob("incidents.jsonl") for each in read_incidents(file)]
    return [each for each in found if each["time"] >= started]


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write what `Outcome.read` reads but for the incidents, which are recorded as they happen.

    Files of an earlier run are kept, renamed. ``metrics.json`` is for runs that came through.

    Args:
        folder: the ``run_dir``.
        outcome: null in the files for a metric that is not finite.
    """
    finite = {key: each if math.isfinite(each) else None for key, each in outcome.metrics.items()}
    finite = dict(sorted(finite.items()))
    if outcome.ending.ends == "finished":
        _write(folder / "metrics.json", finite)
    if outcome.preflight is not None or (folder / "preflight.json").exists():
        _write(folder / "preflight.json", outcome.preflight)
    _write(folder / FILE, {"version": _VERSION, **asdict(outcome.ending), "metrics": finite})


def _write(file: Path, value: Any) -> None:
    write_and_keep(file, json.dumps(value, indent=2) + "\n")


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); run the experiment again") from error


def _read(file: Path) -> dict[str, Any]:
    raw = _load(file)
    version = raw.get("version") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or version != _VERSION:
        raise ValueError(
            f"{file}: version {version!r}, this one reads {_VERSION}; run the experiment again"
        )
    return raw
