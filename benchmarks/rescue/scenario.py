"""Definition of a scenario: a task, its disturbance, and the correct causes.

Imports Lightning through tasks and disturbances.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.rescue.disturbances import Disturbance
from benchmarks.rescue.tasks import Task

HEALTHY = "healthy"
"""Family of the healthy runs."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run with a disturbance, or a healthy run.

    Raises:
        ValueError: A faulty scenario has no correct cause, or a healthy one has causes.
    """

    name: str
    family: str
    task: Task
    disturbance: Disturbance = field(default_factory=Disturbance)
    step: int = 0
    """First batch with the fault."""
    causes: tuple[str, ...] = ()
    """Names in `lit_stability.diagnosis.CAUSES`, each of which is correct."""
    beyond_remedy: str = ""
    """Why no action during the run can reach the twin's loss, decided beforehand; such a run counts
    as saved if its cause is named."""
    twin: Task | None = None
    """Task of the undisturbed run; None for the same task."""

    def __post_init__(self) -> None:
        if self.healthy == bool(self.causes):
            raise ValueError(
                f"causes={self.causes!r} of {self.name!r} in the family {self.family!r}: give the "
                "correct causes, and none for a healthy run"
            )

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong, so that every alarm is false."""
        return self.family == HEALTHY

    def undisturbed(self) -> Scenario:
        """Returns the clean twin, named after its task."""
        task = self.twin or self.task
        return Scenario(name=task.name, family=HEALTHY, task=task)
