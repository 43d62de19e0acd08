"""The expected result of an experiment, as given in its config.

Pure logic on plain data; imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

End: TypeAlias = Literal["finished", "stopped", "failed", "interrupted"]
"""``finished``: the fit and its evaluation ended normally. ``stopped``: the suite ended the run.
``interrupted``: Ctrl-C or SIGTERM did. ``failed``: another exception ended the run."""

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
    """A condition on a number, such as ``< 2.0``; NaN only fulfils ``not finite``.

    Raises:
        ValueError: if the text is not a comparison with a finite number.

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
        """Returns whether a value fulfils the condition; a missing value never does."""
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
                f"{self.text!r} is not a comparison; write '< 2.0' (or <=, >, >=, == and a finite "
                f"number) or '{NOT_FINITE}'"
            )
        return _OPERATORS[match[1]], bound


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The expected result of an experiment; fields that are not set are not checked.

    Raises:
        ValueError: if a comparison cannot be parsed, or a list of causes is empty.
    """

    ends: End = "finished"
    """How the run ends."""
    metrics: dict[str, str] | None = None
    """Conditions by logged name, such as ``test/loss: "< 2.0"``; see `Comparison`."""
    incidents: list[str] | None = None
    """Kinds of the incidents: exactly these, in any order; ``[]`` for no incident."""
    causes: list[str] | None = None
    """Parts of names of leading causes; each must occur in some incident."""
    locates: str | None = None
    """Part of the operation, module or source line that produced a non-finite value first."""
    preflight: dict[str, str] | None = None
    """Text of a finding, or "", by name of the check: exactly these checks found more than a note;
    ``{}`` if `Preflight` ran and found nothing."""

    def __post_init__(self) -> None:
        if self.ends not in get_args(End):
            raise ValueError(f"ends={self.ends!r} is unknown; choose one of {get_args(End)}")
        for name, text in (self.metrics or {}).items():
            _readable(name, text)
        if self.causes is not None and not self.causes:
            raise ValueError("causes=[] checks nothing; remove it, or write incidents: []")
        if "" in (self.causes or []) or self.locates == "":
            raise ValueError(
                f"causes={self.causes}, locates={self.locates!r}: an empty name matches anything; "
                "give a name"
            )


def _readable(metric: str, text: str) -> None:
    """Raises an error with the name of the metric if its comparison cannot be parsed."""
    try:
        Comparison(text)
    except ValueError as error:
        raise ValueError(f"metrics.{metric}: {error}") from None
