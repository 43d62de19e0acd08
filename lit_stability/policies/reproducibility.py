"""Checks whether an anomaly recurs when the same steps are run again.

Imports neither torch nor Lightning. A rollback does not restore its state, and checkpoints do not
contain it, since a restarted job does not begin at the snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["transient", "deterministic"]


@dataclass
class ReproducibilityCheck:
    """Decides from the steps that are run again whether an anomaly is deterministic.

    The anomaly counts as recurred if any anomaly is found up to ``slack`` steps after its own step.
    The first run changes nothing; each recurrence raises ``stage``, which selects what is changed
    for the next run.

    Args:
        slack: steps after that of the anomaly; damage is found some steps after it occurred.

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
        """Returns whether an anomaly at this step is a recurrence of the one that is checked."""
        return self._until is not None and step <= self._until

    @property
    def active(self) -> bool:
        """Whether a check is running."""
        return self._until is not None

    def begin(self, step: int) -> None:
        """Starts a check of the anomaly at this step; raises the stage if it is a recurrence."""
        if self.returns(step):
            self.stage += 1
        else:
            self.stage, self._until = 0, step + self.slack

    def passed(self, step: int) -> Verdict | None:
        """Counts a healthy step; returns the verdict once the checked steps are over."""
        if self._until is None or step < self._until:
            return None
        self._until = None
        return "deterministic" if self.stage else "transient"

    def end(self) -> None:
        """Ends the check without a verdict, as another batch takes the place of the checked one."""
        self._until = None
