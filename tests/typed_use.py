"""A user's code as a type checker sees it: `make check` reads this file, and nothing runs it.

An error that is no longer found leaves an unused ignore, which is an error itself.
"""

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    Incident,
    StabilityCallback,
    fit_with_recovery,
    locate_nonfinite,
    read_incidents,
    stability_callbacks,
)


class Pager(StabilityCallback):
    """Overrides one hook with the parameters of the base class, and another with too few."""

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Reads a field, and misspells another."""
        print(incident.outcome, incident.otcome)  # type: ignore[attr-defined]

    def on_rollback(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Takes no module."""


def accepted() -> list[Callback]:
    """Returns callbacks that are used as their documentation says."""
    suite: list[Callback] = [*stability_callbacks(), GradientMonitor(close_after=3), Pager()]
    Trainer(callbacks=[*suite, AutoRollback(snapshot_every=10)])
    return suite


def refused() -> None:
    """Gets names and types wrong."""
    AutoRollback(snapshot_evry=3)  # type: ignore[call-arg]
    AutoRollback(after_rollback="reply")  # type: ignore[arg-type]
    GradientMonitor(close_after="3")  # type: ignore[arg-type]
    read_incidents(7)  # type: ignore[arg-type]
    fit_with_recovery()  # type: ignore[call-arg]
    locate_nonfinite()  # type: ignore[call-arg]
