"""What may be put around a fit: nothing, what Lightning has, what PyPI has, and this suite.

`PROTECTIONS` gives them by name; each is used as its own documentation says, with its defaults
where its docstring says nothing else.
`missing` says which of them cannot be run here, and why. Those from PyPI are imported only when
they are asked for.
"""

from __future__ import annotations

from benchmarks.alternatives.protection import Protection
from benchmarks.alternatives.published import Arc, AutoClip, StabilityGuard, ZClip
from benchmarks.alternatives.shipped import Clipping, LightningSpikeDetection, Nothing, Suite

__all__ = ["PROTECTIONS", "Protection", "missing"]

PROTECTIONS: dict[str, type[Protection]] = {
    each.name: each
    for each in (
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
"""By name, in the order of the tables."""


def missing() -> dict[str, str]:
    """Protections that cannot be run here, each with the error that says why."""
    found = ((name, each.problem()) for name, each in PROTECTIONS.items())
    return {name: problem for name, problem in found if problem is not None}
