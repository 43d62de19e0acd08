"""What a scenario is: a run, what goes wrong in it, and what it is fair to expect.

May import Lightning through what it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.rescue.tasks import Task
from benchmarks.rescue.troubles import Trouble

HEALTHY = "healthy"
"""The family of the runs with which nothing is wrong."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run that goes wrong, or does not.

    Raises:
        ValueError: if a run that goes wrong has no acceptable cause, or a healthy one has some.
    """

    name: str
    family: str
    task: Task
    trouble: Trouble = field(default_factory=Trouble)
    step: int = 0
    """Batch in which it begins."""
    causes: tuple[str, ...] = ()
    """Names of `lit_stability.diagnosis.CAUSES`, any of which is right."""
    beyond_remedy: str = ""
    """Why nothing that is done during the run can bring it to its twin's loss, known beforehand;
    then the cause is to be named instead."""
    twin: Task | None = None
    """The undisturbed run; None for the same without the trouble."""

    def __post_init__(self) -> None:
        if self.healthy == bool(self.causes):
            raise ValueError(
                f"causes={self.causes!r} of {self.name!r} in the family {self.family!r}: give the "
                "causes that would be right, and none for a healthy run"
            )

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong, so that nobody may object."""
        return self.family == HEALTHY

    def undisturbed(self) -> Scenario:
        """The clean twin, by the name of its task."""
        task = self.twin or self.task
        return Scenario(name=task.name, family=HEALTHY, task=task)
