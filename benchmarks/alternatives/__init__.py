"""Protections of a fit that the benchmarks compare: none, Lightning's, PyPI packages, this suite.

`PROTECTIONS` maps names to them. Each is used as its documentation describes, with default options
unless its docstring states others. `missing` returns those that cannot run here, with the reason.
Packages from PyPI are imported only when they are used.
"""

from __future__ import annotations

from benchmarks.alternatives.protection import Protection
from benchmarks.alternatives.published import Arc, AutoClip, StabilityGuard, ZClip
from benchmarks.alternatives.shipped import Clipping, LightningSpikeDetection, Nothing, Suite

__all__ = ["PROTECTIONS", "Protection", "missing"]

PROTECTIONS: dict[str, type[Protection]] = {
    kind.name: kind
    for kind in (
        Nothing,
        Clipping,
        LightningSpikeDetection,
        ZClip,
        AutoClip,
        StabilityGuard,
        Arc,
        Suite,
    )
}
"""Protections by name, in the order of the tables."""


def missing() -> dict[str, str]:
    """Returns the protections that cannot run here, with the error."""
    problems = ((name, kind.problem()) for name, kind in PROTECTIONS.items())
    return {name: problem for name, problem in problems if problem is not None}
