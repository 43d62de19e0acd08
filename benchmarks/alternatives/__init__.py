"""Protections of a fit that the benchmarks compare: none, Lightning's, PyPI packages, this suite.

`PROTECTIONS` maps names to them. Each is used as its documentation describes, with default options
unless its docstring states others. `missing` returns those that cannot run here, with the reason,
and `find` also loads a protection from a module outside. Packages from PyPI are imported only when
they are used.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.alternatives.protection import Protection
from benchmarks.alternatives.published import Arc, AutoClip, StabilityGuard, ZClip
from benchmarks.alternatives.shipped import (
    Clipping,
    LightningSpikeDetection,
    Nothing,
    ObservingSuite,
    Suite,
)

__all__ = ["PROTECTIONS", "Protection", "find", "missing"]

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

ALL = {**PROTECTIONS, ObservingSuite.name: ObservingSuite}
"""These, and the suite without responses, which only the corpus measures."""


def missing() -> dict[str, str]:
    """Returns the protections that cannot run here, with the error."""
    problems = ((name, kind.problem()) for name, kind in PROTECTIONS.items())
    return {name: problem for name, problem in problems if problem is not None}


def find(name: str) -> type[Protection]:
    """Returns a protection by its name in the tables, or by its module and class.

    Args:
        name: A key of `ALL`, or ``package.module:Class``.

    Raises:
        ValueError: There is no such protection, or its class cannot be used.

    >>> find("clipping at 1.0").__name__
    'Clipping'
    >>> find("benchmarks.alternatives.shipped:Suite").name
    'this suite'
    """
    if name in ALL:
        return ALL[name]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"there is no protection {name!r}: give one of {list(ALL)}, or package.module:Class"
        )
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load the protection {name!r}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Protection)):
        raise ValueError(f"{name!r} is {kind!r}: a protection must be a subclass of Protection")
    title = getattr(kind, "name", "")
    if not title or ALL.get(title, kind) is not kind:
        raise ValueError(
            f"{name!r} has the name {title!r}: set a class attribute `name` unlike {list(ALL)}"
        )
    return kind
