"""Detects results and weights that `IntegrityAudit` found to be wrong.

Uses the readings of an `IntegrityAudit`; without one it flags nothing.
"""

from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly
from lit_stability.measurement.step_stats import ProbeReading, StepStats

KIND = "silent data corruption"
STEP, STATE = "wrong_step", "wrong_state"
"""Quantities of the readings: gradients of this step, or weights and moments."""


def reading(quantity: str, tensor: str, text: str, since: int) -> ProbeReading:
    """Returns a finding as a reading.

    Args:
        quantity: `STEP` or `STATE`.
        tensor: the first tensor that is wrong.
        text: what was found, on which rank and host.
        since: step in which it became wrong.
    """
    return ProbeReading(quantity, f"{tensor}\n{text}", float(since), logged=False)


class SilentCorruption:
    """Flags a step whose gradients are wrong, and weights or moments that have been damaged.

    The audit has compared the step with two reruns of it, so there is nothing to learn here: each
    reading is flagged. Wrong gradients are rejected with the step; wrong weights ask for a
    rollback.

    >>> detector = SilentCorruption()
    >>> wrong = reading(STEP, "w", "w (bit 12) differs, on rank 0", since=7)
    >>> stats = StepStats(step=7, loss=1.0, grad_norm=1.0, readings=(wrong,))
    >>> anomaly = detector.check(stats)
    >>> anomaly.message, anomaly.state_corrupted
    ('w (bit 12) differs, on rank 0', False)
    """

    shared_by_ranks = "yes"

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if the step, or the state before it, is wrong."""
        if not stats.readings:
            return None
        state, step = ([r for r in stats.readings if r.quantity == q] for q in (STATE, STEP))
        found = state or step
        if not found:
            return None
        names = [each.where.partition("\n")[0] for each in found]
        message = found[0].where.partition("\n")[2]
        return Anomaly(
            kind=KIND,
            step=stats.step,
            value=float(len(found)),
            signal="integrity",
            optimizer=stats.optimizer,
            state_corrupted=bool(state),
            since=int(min(each.value for each in state)) if state else None,
            layers=tuple((name, 1.0) for name in names[:5]),
            message=message if len(found) == 1 else f"{message}, and {len(found) - 1} more",
        )

    def update(self, stats: StepStats) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores nothing."""
