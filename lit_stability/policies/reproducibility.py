"""Whether an anomaly returns when the same steps are taken again.

Data in, data out: no torch, no Lightning. Monotone state: a rollback never rewinds it. A
checkpoint does not carry it, as a restarted job does not begin at the snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["transient", "deterministic"]


@dataclass
class ReproducibilityCheck:
    """Steps taken again after an anomaly, to see whether it returns.

    It returns if anything is found before the step of the anomaly, and ``slack`` more, have been
    passed. The first pass changes nothing; each return raises the stage, and with it what is
    changed for the next pass.

    Args:
        slack: steps beyond that of the anomaly; damage is found some steps after it is done.

    >>> reproducibility = ReproducibilityCheck(slack=0)
    >>> reproducibility.begin(7); reproducibility.passed(6); reproducibility.passed(7)
    'transient'
    >>> reproducibility.begin(9); reproducibility.returns(9)
    True
    >>> reproducibility.begin(9); reproducibility.stage, reproducibility.passed(9)
    (1, 'deterministic')
    """

    slack: int = 10
    stage: int = 0
    _until: int | None = None

    def returns(self, step: int) -> bool:
        """Whether an anomaly at a step is the return of the one on trial."""
        return self._until is not None and step <= self._until

    @property
    def active(self) -> bool:
        """Whether the steps are being taken again."""
        return self._until is not None

    def begin(self, step: int) -> None:
        """Take the steps up to one again; a pass that follows a return is a stage higher."""
        if self.returns(step):
            self.stage += 1
        else:
            self.stage, self._until = 0, step + self.slack

    def passed(self, step: int) -> Verdict | None:
        """Count a healthy step; the verdict once the anomaly's own is passed."""
        if self._until is None or step < self._until:
            return None
        self._until = None
        return "deterministic" if self.stage else "transient"

    def end(self) -> None:
        """Another batch takes the place of the one on trial."""
        self._until = None
