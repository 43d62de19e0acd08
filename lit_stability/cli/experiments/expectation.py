"""What an experiment is expected to show, as its config states it.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

End: TypeAlias = Literal["finished", "stopped", "failed"]
"""``finished``: the fit and its evaluation came through. ``stopped``: the suite ended the run.
``failed``: another exception did."""

NOT_FINITE = "not finite"
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_COMPARISON = re.compile(r"\s*(<=|>=|==|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Comparison:
    """What a number is to be, such as ``< 2.0``; NaN is nothing but ``not finite``.

    Raises:
        ValueError: the text is no comparison with a finite number.

    >>> [Comparison(text).holds(0.5) for text in ("< 2.0", ">= 0.9", "== 0.5", "not finite")]
    [True, False, True, False]
    >>> [Comparison(text).holds(math.nan) for text in ("< 2.0", "> 2.0", "not finite")]
    [False, False, True]
    """

    text: str

    def __post_init__(self) -> None:
        if self.text != NOT_FINITE:
            self._parts()

    def holds(self, value: float | None) -> bool:
        """Whether it is true of a value; of one that is missing nothing is."""
        if value is None:
            return False
        if self.text == NOT_FINITE:
            return not math.isfinite(value)
        compare, bound = self._parts()
        return compare(value, bound)

    def _parts(self) -> tuple[Callable[[float, float], bool], float]:
        match = _COMPARISON.fullmatch(self.text)
        try:
            bound = float(match[2]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            raise ValueError(
                f"{self.text!r} is no comparison; write '< 2.0' (or <=, >, >=, == and a finite "
                f"number) or '{NOT_FINITE}'"
            )
        return _OPERATORS[match[1]], bound


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What an experiment shows; what is left out is not asked.

    Raises:
        ValueError: a comparison cannot be read, or a list of causes is empty.
    """

    ends: End = "finished"
    """How the run ends."""
    metrics: dict[str, str] | None = None
    """By logged name, such as ``test/loss: "< 2.0"``; see `Comparison`."""
    incidents: list[str] | None = None
    """Kinds of the incidents: these and no others, in any order; ``[]`` for no incident."""
    causes: list[str] | None = None
    """Each is part of the name of some incident's leading cause."""
    locates: str | None = None
    """Part of the operation, module or source line in which some non-finite value was born."""
    preflight: dict[str, str] | None = None
    """By name of the check, words of what it found, or "": these checks and no others found
    something worse than a note; ``{}`` where `Preflight` ran and had nothing to say."""

    def __post_init__(self) -> None:
        if self.ends not in get_args(End):
            raise ValueError(f"ends={self.ends!r} is unknown; choose one of {get_args(End)}")
        for name, text in (self.metrics or {}).items():
            _readable(name, text)
        if self.causes is not None and not self.causes:
            raise ValueError("causes=[] asks nothing; leave it out, or write incidents: []")
        if "" in (self.causes or []) or self.locates == "":
            raise ValueError(
                f"causes={self.causes}, locates={self.locates!r}: an empty name fits anything; "
                "fill it in"
            )


def _readable(metric: str, text: str) -> None:
    """Refuse a comparison that cannot be read, by the name of its metric."""
    try:
        Comparison(text)
    except ValueError as error:
        raise ValueError(f"metrics.{metric}: {error}") from None
