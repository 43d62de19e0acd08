"""The `Anomaly` that a detector returns, and the `Detector` protocol."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from lit_stability.measurement.step_stats import StepStats

Kind = Literal[
    "non-finite loss",
    "non-finite gradient",
    "non-finite weight",
    "non-finite buffer",
    "damaged state at the start",
    "exception",
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
    "silent data corruption",
]


AT_START: Kind = "damaged state at the start"
"""Kind of the anomaly that is found before the first step; no rollback can help against it."""


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """A step that a detector flags: the measured value, what it was compared with, and where.

    By default the step is skipped. ``state_corrupted`` asks for a rollback instead; with
    ``warn_only`` the anomaly is reported and the step is taken.

    >>> print(Anomaly(kind="gradient spike", step=7, value=90.0, signal="grad_norm",
    ...               message="gradient norm 90, usually 3").message)
    gradient norm 90, usually 3
    """

    kind: Kind | str
    """One of `Kind`, or the name that a custom detector chooses."""
    step: int
    """Optimizer steps taken before the flagged step."""
    value: float
    """The measured value, in the unit of ``signal``."""
    message: str
    """One line for the log: the observation and what it was compared with."""
    signal: str
    """Name of the measured quantity."""
    baseline: float | None = None
    """Usual value of the quantity on healthy steps, None if there is none."""
    threshold: float | None = None
    """Bound that ``value`` violated, None if there is none."""
    optimizer: int = 0
    state_corrupted: bool = False
    """Whether weights or optimizer state are damaged, so that skipping the step is not enough."""
    warn_only: bool = False
    """Whether the step itself is good: the anomaly is reported, the step is taken and learnt."""
    replay_first: bool = False
    """Whether the same steps are run again before anything is lowered, because that tells damage
    from what the program does itself."""
    since: int | None = None
    """Step of the suspected batch, None if it is the flagged step itself."""
    layers: tuple[tuple[str, float], ...] = ()
    """The most affected parameters, each with its value."""
    hold: tuple[float, ...] = ()
    """After a learning-rate jump, factor per group back to its last accepted learning rate."""

    @property
    def suspect(self) -> int:
        """Step of the suspected batch."""
        return self.step if self.since is None else self.since


def with_damage(anomaly: Anomaly, weights: Sequence[str], moments: Sequence[str]) -> Anomaly:
    """Returns the anomaly, changed to one of damaged state if an audit found non-finite state.

    Damaged state takes precedence because it needs a rollback, whatever the detector flagged.

    Args:
        anomaly: as a detector returned it.
        weights: names of the parameters that are non-finite.
        moments: names of the parameters whose optimizer state is non-finite.
    """
    if anomaly.kind == "silent data corruption" and anomaly.state_corrupted:
        return anomaly  # it names the cause of what is non-finite
    if weights and anomaly.kind != "non-finite weight":
        kind, damage = "non-finite weight", f"{len(weights)} parameters are non-finite"
    elif moments and not weights and not anomaly.state_corrupted:
        kind, damage = "optimizer state", f"the state of {len(moments)} parameters is non-finite"
    else:
        return anomaly
    names = weights or moments
    return replace(
        anomaly,
        kind=kind,
        message=f"{anomaly.message}; {damage}, first {names[0]}",
        layers=tuple((name, math.nan) for name in names[:5]),
        state_corrupted=True,
        warn_only=False,
        since=max(0, anomaly.step - 1),
    )


@runtime_checkable
class Detector(Protocol):
    """The interface of a detector of `GradientMonitor`.

    Optional attributes:

    * ``shared_by_ranks = "yes"``: the detector uses neither gradients nor anything else that
      differs between ranks, and runs before the gradients are compared.
    * ``regimes``: how often the detector has accepted values that it had rejected for long.
    * ``reset_windows()``: clears what the detector has learnt. When one detector that has this
      method accepts a change of regime, it is called on all that have it.
    """

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns the anomaly of a step, None if the step is healthy."""

    def update(self, stats: StepStats) -> None:
        """Learns from an accepted step."""

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that changes during a run, as plain floats, ints and lists."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


def flagged(detector: Detector, stats: StepStats) -> bool:
    """Runs a detector without a Trainer on one step, which it learns if it does not flag it.

    Args:
        detector: any detector.
        stats: of the next step.

    Returns:
        Whether the detector flags the step.
    """
    if detector.check(stats) is not None:
        return True
    detector.update(stats)
    return False


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Rejects an argument that does not meet a condition.

    Raises:
        ValueError: if ``condition`` is False; the message repeats name and value.
    """
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def require_instance(name: str, value: object, kind: type) -> None:
    """Rejects an argument that is neither None nor an instance of its class, such as a dict.

    Raises:
        ValueError: if it is something else; the message shows how to make an instance.
    """
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{name} must be a {kind.__name__}, got {value!r}; write {name}={kind.__name__}(...), "
            f"of {kind.__module__}"
        )
