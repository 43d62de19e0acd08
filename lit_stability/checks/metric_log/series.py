"""One logged metric as arrays, and the log of a run as readers return it.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Series:
    """The points of one metric in the order in which they were written; 24 bytes a point.

    >>> loss = Series("loss")
    >>> for step, value in ((0, 2.0), (1, 1.5), (2, 9.0), (2, 1.4)):
    ...     loss.add(step, value)
    >>> len(loss), loss.values[-1]
    (4, 1.4)
    """

    name: str
    steps: array[int] = field(default_factory=lambda: array("q"), repr=False)
    values: array[float] = field(default_factory=lambda: array("d"), repr=False)
    times: array[float] = field(default_factory=lambda: array("d"), repr=False)
    """Seconds since 1970, NaN where the log has no time."""

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float, time: float = math.nan) -> None:
        """Adds a point."""
        self.steps.append(step)
        self.values.append(value)
        self.times.append(time)

    def part(self, start: int, end: int | None = None) -> Series:
        """Returns a copy of the points with these indices."""
        return Series(
            self.name, self.steps[start:end], self.values[start:end], self.times[start:end]
        )

    def tail(self, condition: Callable[[float], bool]) -> int:
        """Returns the index from which on all values meet a condition; the length if none does.

        >>> loss = Series("loss")
        >>> for step, value in enumerate((0.0, 1.0, 0.0, 0.0)):
        ...     loss.add(step, value)
        >>> loss.tail(lambda value: value == 0)
        2
        """
        start = len(self)
        while start > 0 and condition(self.values[start - 1]):
            start -= 1
        return start

    def attempts(self) -> Iterator[tuple[int, int]]:
        """Returns first index and end of each part in which the steps do not go back.

        A run that was started again in the same folder repeats steps, and each start is a part.
        """
        start = 0
        for i in range(1, len(self.steps)):
            if self.steps[i] < self.steps[i - 1]:
                yield start, i
                start = i
        if len(self.steps):
            yield start, len(self.steps)

    def in_force(self) -> Series:
        """Returns the series without the points that a later attempt replaced.

        >>> loss = Series("loss")
        >>> for step in (0, 1, 2, 3, 2, 3, 4):
        ...     loss.add(step, 0.1 * step)
        >>> list(loss.in_force().steps)
        [0, 1, 2, 3, 4]
        """
        parts = [*self.attempts()]
        if len(parts) < 2:
            return self
        kept = Series(self.name)
        for start, end in parts:
            valid = bisect_left(kept.steps, self.steps[start])
            del kept.steps[valid:], kept.values[valid:], kept.times[valid:]
            kept.steps += self.steps[start:end]
            kept.values += self.values[start:end]
            kept.times += self.times[start:end]
        return kept


@dataclass
class MetricLog:
    """What one reader has read of one run."""

    format: str
    """Name of the format, such as ``TensorBoard``."""
    path: Path
    """The file; the folder, if the run has several files."""
    files: tuple[Path, ...]
    series: dict[str, Series] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What could not be read, one sentence each."""
    complete: bool | None = None
    """Whether the log has the end of the run; None if the format does not record it."""
    exit_code: int | None = None
    """Exit code of the program, None if it was not recorded."""
    planned_steps: int | None = None
    """Steps that the run was configured for, None if they were not recorded."""
    hides_nan: bool = False
    """Whether the logger may write 0 or an average where the loss is NaN."""

    def add(self, name: str, step: int, value: float, time: float = math.nan) -> None:
        """Adds a point to the series of a name."""
        found = self.series.get(name)
        if found is None:
            found = self.series[name] = Series(name)
        found.add(step, value, time)


def is_bad(value: float) -> bool:
    """Returns whether a value is NaN or Inf."""
    return not math.isfinite(value)


def number_of(value: object) -> float | None:
    """Returns a logged value as a float; NaN and Inf may be strings; None if it is no number.

    >>> number_of("NaN"), number_of("-Infinity"), number_of(True), number_of(""), number_of([1])
    (nan, -inf, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
