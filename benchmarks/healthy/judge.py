"""Compares the bare run of a kind with the run with the suite.

Imports what `benchmarks.healthy.run` imports.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.healthy.kind import Kind, is_healthy, start_and_end
from benchmarks.healthy.run import Run, run

Verdict = Literal["silent", "observed only", "disturbed (not identical)", "stopped/crashed"]
VERDICTS: tuple[Verdict, ...] = (
    "silent",
    "observed only",
    "disturbed (not identical)",
    "stopped/crashed",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A kind with its verdict; all fields have JSON types."""

    name: str
    group: str
    practice: str
    seed: int
    verdict: Verdict
    """``silent``: bit-identical, no incident, no warning. ``observed only``: bit-identical, with
    incidents or warnings."""
    different: tuple[str, ...]
    """Parts of the end state that are not bit-identical."""
    incidents: dict[str, int]
    """Kind of the anomaly -> number of incidents."""
    warnings: tuple[str, ...]
    """Warnings that the suite logged, without those about incidents."""
    responses: dict[str, int]
    """Description of the response -> number of times."""
    rollbacks: int
    steps: tuple[int, int]
    """``global_step`` at the end, bare and with the suite."""
    values: tuple[float, float, float]
    """What the run is judged by: at the start, at the end of the bare run, and with the suite."""
    seconds: tuple[float, float]
    """Wall-clock time, bare and with the suite."""
    message: str = ""
    """Why the run with the suite did not finish."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the comparison as a JSON object."""
        return asdict(self)


class NotHealthyError(RuntimeError):
    """The bare run of a kind cannot be compared: it fails, does not learn or does not repeat."""


def compare(kind: Kind, seed: int = 0) -> Comparison:
    """Runs a kind bare and with the suite.

    Raises:
        NotHealthyError: The kind itself is at fault.
    """
    bare = run(kind, seed, with_suite=False)
    check(kind, bare)
    suite = run(kind, seed, with_suite=True)
    different = different_parts(bare, suite)
    if different and different_parts(bare, run(kind, seed, with_suite=False)):
        raise NotHealthyError(f"{kind.name!r}: two bare runs with one seed differ")
    start, end = start_and_end(bare.values)
    return Comparison(
        name=kind.name,
        group=kind.group,
        practice=kind.practice,
        seed=seed,
        verdict=verdict_on(suite, different),
        different=different,
        incidents=dict(Counter(i.first.kind for i in suite.incidents)),
        warnings=tuple(w for w in suite.warnings if not w.startswith("incident ")),
        responses=dict(Counter(suite.responses)),
        rollbacks=sum(r.startswith("rolled back") for r in suite.responses),
        steps=(bare.steps, suite.steps),
        values=(start, end, start_and_end(suite.values)[1] if suite.values else float("nan")),
        seconds=(bare.seconds, suite.seconds),
        message=suite.message,
    )


def check(kind: Kind, bare: Run) -> None:
    """Checks that a bare run is a healthy one.

    Raises:
        NotHealthyError: It did not finish, or its value neither fell nor is at the floor.
    """
    if bare.ended != "finished":
        raise NotHealthyError(f"{kind.name!r}: the bare run {bare.ended}: {bare.message}")
    if not is_healthy(bare.values, kind.floor):
        start, end = start_and_end(bare.values) if bare.values else (None, None)
        raise NotHealthyError(
            f"{kind.name!r}: the value goes from {start} to {end} without the suite"
        )


def different_parts(one: Run, other: Run) -> tuple[str, ...]:
    """Returns the names of the parts in which two runs are not bit-identical."""
    return tuple(name for name, digest in one.parts.items() if digest != other.parts[name])


def verdict_on(suite: Run, different: tuple[str, ...]) -> Verdict:
    """Returns the verdict on a run with the suite.

    >>> verdict_on(Run(), ()), verdict_on(Run(warnings=["w"]), ()), verdict_on(Run(), ("weights",))
    ('silent', 'observed only', 'disturbed (not identical)')
    >>> verdict_on(Run(ended="stopped"), ("weights",))
    'stopped/crashed'
    """
    if suite.ended != "finished":
        return "stopped/crashed"
    if different:
        return "disturbed (not identical)"
    return "observed only" if suite.incidents or suite.warnings else "silent"
