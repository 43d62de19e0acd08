"""What a detector says, and what a detector is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from lit_stability.measurement.step_stats import StepStats

Kind = Literal[
    "non-finite loss",
    "non-finite gradient",
    "non-finite weight",
    "gradient spike",
    "loss spike",
    "divergence",
    "learning-rate jump",
    "update spike",
    "optimizer state",
    "layer bound",
    "rank disagreement",
    "loss-scale collapse",
    "loss-scale fall",
    "infinite loss",
    "lost updates",
    "vanishing gradient",
    "dead gradients",
    "stalled layers",
    "weight corruption",
    "attention-logit growth",
    "attention collapse",
    "curvature beyond the edge",
]


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """One step that a detector objects to: what was measured, against what, and where.

    ``kind`` and ``message`` say it in words; ``signal`` is what was measured, ``value`` how much,
    ``baseline`` and ``threshold`` against what. ``state_corrupted`` asks for a rollback and not
    only for the step to be left out; ``warn_only`` for nothing but to be told of.
    """

    kind: Kind | str
    """One of `Kind`, or the name that a detector of your own gives."""
    step: int
    """Optimizer steps taken before the step in question."""
    value: float
    """What was measured, in the unit of ``signal``."""
    message: str
    """One line for the log: what was seen, against what."""
    signal: str
    """Name of the measured quantity."""
    baseline: float | None = None
    """What the quantity is on healthy steps, None where there is no such value."""
    threshold: float | None = None
    optimizer: int = 0
    state_corrupted: bool = False
    """Whether weights or optimizer state are damaged, so that a skip is too little."""
    warn_only: bool = False
    """Whether the step itself is good: it is told of, taken and learnt from."""
    since: int | None = None
    """Step of the batch that is suspected, where that is not the step itself."""
    layers: tuple[tuple[str, float], ...] = ()
    """The parameters that show it most, each with its value."""
    hold: tuple[float, ...] = ()
    """Factor that brings each group back to its last accepted learning rate; only with a jump."""

    @property
    def suspect(self) -> int:
        """Step of the batch that is suspected."""
        return self.step if self.since is None else self.since


def with_damage(anomaly: Anomaly, weights: Sequence[str], moments: Sequence[str]) -> Anomaly:
    """The anomaly in the light of an audit: damaged state is what most needs to be known.

    Args:
        anomaly: what a detector said.
        weights: parameters found non-finite.
        moments: parameters whose optimizer state was found non-finite.
    """
    if weights and anomaly.kind != "non-finite weight":
        kind, seen = "non-finite weight", f"{len(weights)} parameters are non-finite"
    elif moments and not weights and not anomaly.state_corrupted:
        kind, seen = "optimizer state", f"the state of {len(moments)} parameters is non-finite"
    else:
        return anomaly
    names = weights or moments
    return replace(
        anomaly,
        kind=kind,
        message=f"{anomaly.message}; {seen}, first {names[0]}",
        layers=tuple((name, math.nan) for name in names[:5]),
        state_corrupted=True,
        warn_only=False,
        since=max(0, anomaly.step - 1),
    )


@runtime_checkable
class Detector(Protocol):
    """What `GradientMonitor` asks of a detector.

    One that looks neither at gradients nor at anything that differs from rank to rank may say so by
    ``shared_by_ranks = "yes"``: it is then asked before gradients are looked at. One that gives in
    to values that stay counts it in ``regimes``; if it has a ``reset_windows()``, so have others to
    begin anew with it.
    """

    def check(self, stats: StepStats) -> Anomaly | None:
        """Say what is wrong with a step, or None."""

    def update(self, stats: StepStats) -> None:
        """Learn from an accepted step."""

    def state_dict(self) -> dict[str, Any]:
        """What evolves, as plain floats, ints and lists."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""


def flagged(detector: Detector, stats: StepStats) -> bool:
    """Drive a detector by hand: learn from a step that passes, True for one that does not.

    Args:
        detector: as `GradientMonitor` is given it.
        stats: of the next step.
    """
    if detector.check(stats) is not None:
        return True
    detector.update(stats)
    return False


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Refuse an option with a message that repeats it.

    Raises:
        ValueError: if the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def require_instance(name: str, value: object, kind: type) -> None:
    """Refuse an option that is neither None nor an object of its class, such as a dict.

    Raises:
        ValueError: with what to write.
    """
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{name} must be a {kind.__name__}, got {value!r}; write {name}={kind.__name__}(...), "
            f"of {kind.__module__}"
        )
