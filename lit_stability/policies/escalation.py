"""Which response an anomaly gets: the smallest that is enough, on a budget, ending in a stop.

Data in, data out: no torch, no Lightning. The ladder is monotone state: a rollback never rewinds
it, and a checkpoint carries it.

    bad batch, state intact ......... take the step again; if it returns, leave the batch out
    learning rate jumped ............ hold it at what the run has borne
    weights or moments damaged ...... roll back and replay; if it returns, leave the suspect out;
                                      then from an older snapshot; then as below
    struck again on probation ....... roll back with a lower learning rate and a tighter clip
    learning rate likely too high ... the same, at once; not again if it was to no avail
    architecture certain to fail .... stop, with the cause
    budget spent .................... stop, with the remedy

Where data cannot be replayed, a bad batch is skipped at once and a rollback goes on with new data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lit_stability.detectors import Anomaly
from lit_stability.diagnosis import RecommendedAction
from lit_stability.policies.actions import (
    HoldLearningRate,
    Response,
    RetryStep,
    RollBack,
    SkipStep,
    Stop,
)
from lit_stability.policies.reproducibility import ReproducibilityCheck, Verdict

_LARGEST_CUT = 1e3
"""A single rollback divides the learning rate by no more than this."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many responses a run may spend.

    Raises:
        ValueError: if a number is out of its range.
    """

    skips_in_a_row: int = 10
    """Steps skipped one after the other before the state is suspected and rolled back."""
    skips: int = 100
    rollbacks: int = 8
    holds: int = 8
    refill_skips_every: int = 20
    """Healthy steps that give back one skip: with one bad batch in twenty a run still goes on."""
    refill_every: int = 500
    """Healthy steps that give back one rollback and one hold."""
    lr_factor: float = 0.5
    """Learning-rate cut of a rollback that follows another within probation."""
    clip_factor: float = 0.5
    probation: int = 50
    """Healthy steps after a rollback within which the next one counts as a second strike."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("lr_factor", "clip_factor"):
                if not 0 < value < 1:
                    raise ValueError(f"{name} must be in (0, 1), got {value!r}")
            elif value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")


class EscalationPolicy:
    """Chooses responses and counts what they cost.

    However anomalies arrive, at most ``skips + rollbacks + holds`` responses are given, plus one
    per ``refill_skips_every`` and two per ``refill_every`` healthy steps; when one sort has run out
    the next heavier is taken, and at the end of the ladder is `Stop`.

    Args:
        budget: the limits.

    >>> from lit_stability.detectors import Anomaly
    >>> nan = Anomaly(kind="non-finite loss", step=3, value=float("nan"), message="", signal="loss")
    >>> from lit_stability.policies.actions import describe
    >>> escalation = EscalationPolicy(Budget(skips_in_a_row=2))
    >>> [describe(escalation.respond(nan)) for _ in range(3)]
    ['step skipped', 'step skipped', 'rolled back, learning rate x0.5, clip x0.5']
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self._left = {
            "skips": self.budget.skips,
            "rollbacks": self.budget.rollbacks,
            "holds": self.budget.holds,
        }
        self._skips_in_a_row = 0
        self._healthy = 0
        self._since_rollback: int | None = None
        self.reproducibility = ReproducibilityCheck()
        """Of the steps since a snapshot."""
        self.retried = ReproducibilityCheck(slack=0)
        """Of one step alone."""
        self.lowered: tuple[int, float] | None = None
        """Step and value of the anomaly that the learning rate was lowered for as its cause, until
        the step is passed."""

    def healthy(self, step: int | None = None) -> Verdict | None:
        """Count a healthy step; returns the verdict of a trial that ends with it."""
        self._skips_in_a_row = 0
        self._healthy += 1
        if self.lowered is not None and step is not None and step >= self.lowered[0]:
            self.lowered = None
        if self._since_rollback is not None:
            self._since_rollback += 1
        if self._healthy % self.budget.refill_skips_every == 0:
            self._left["skips"] = min(self._left["skips"] + 1, self.budget.skips)
        if self._healthy % self.budget.refill_every == 0:
            self._left["rollbacks"] = min(self._left["rollbacks"] + 1, self.budget.rollbacks)
            self._left["holds"] = min(self._left["holds"] + 1, self.budget.holds)
        if step is None:
            return None
        verdicts = [self.retried.passed(step), self.reproducibility.passed(step)]
        return next((verdict for verdict in verdicts if verdict is not None), None)

    def returns(self, anomaly: Anomaly, *, state_corrupted: bool) -> bool:
        """Whether an anomaly is the return of one that the same steps were taken again for."""
        damaged = anomaly.state_corrupted or state_corrupted
        return (self.reproducibility if damaged else self.retried).returns(anomaly.step)

    def respond(
        self,
        anomaly: Anomaly,
        *,
        state_corrupted: bool = False,
        excess: float = 1.0,
        replay: bool = False,
        older: bool = False,
        adjusted: bool = False,
        recommended_action: RecommendedAction = "usual",
        cause: str = "",
    ) -> Response:
        """Choose and pay for the response to an anomaly.

        Args:
            anomaly: what was found.
            state_corrupted: whether an audit of weights and optimizer state found damage, beyond
                what the anomaly itself knows.
            excess: how many times its healthy baseline the update-to-weight ratio was just before;
                a cut divides the learning rate by at least this much, up to 1000.
            replay: whether the step, or those since the snapshot, can be taken again.
            older: whether there is a snapshot before the newest confirmed one.
            adjusted: whether something was changed that may cure it, such as the precision: what
                returned with the old is tried with the new as if it had not.
            recommended_action: what the cause asks for; see `lit_stability.diagnosis`.
            cause: for the reason of a stop.
        """
        if recommended_action == "stop":
            return Stop(f"{cause} ({anomaly.message})")
        damaged = anomaly.state_corrupted or state_corrupted
        if adjusted:
            self.retried.end()
            self.reproducibility.end()
        elif anomaly.kind == "loss-scale collapse":
            return Stop(anomaly.message)
        if anomaly.hold and not damaged and self._spend("holds"):
            return HoldLearningRate(anomaly.hold)
        if (
            recommended_action == "lower"
            and not self._in_vain(anomaly)
            and self._spend("rollbacks")
        ):
            self.reproducibility.end()
            self.lowered = anomaly.step, anomaly.value
            return self._lower(excess, replay)
        row_is_full = self._skips_in_a_row >= self.budget.skips_in_a_row
        if not damaged and not row_is_full and self._spend("skips"):
            return self._reject_step(anomaly.step, replay)
        if self._spend("rollbacks"):
            if replay and damaged:
                return self._replay(anomaly, excess, older)
            return self._roll_back(damaged, anomaly.kind == "divergence", excess, replay)
        return Stop(
            f"{anomaly.kind} came back after {self.budget.rollbacks} rollbacks ({anomaly.message})"
        )

    def _reject_step(self, step: int, replay: bool) -> Response:
        if replay and not self.retried.returns(step):
            self.retried.begin(step)
            return RetryStep()
        self.retried.end()
        self._skips_in_a_row += 1
        return SkipStep()

    def _replay(self, anomaly: Anomaly, excess: float, older: bool) -> RollBack:
        outside = anomaly.kind not in ("divergence", "update spike")
        again = (
            self._on_probation and not outside and not self.reproducibility.returns(anomaly.step)
        )
        self.reproducibility.begin(anomaly.step)
        self._since_rollback = 0
        self._skips_in_a_row = 0
        stage = self.reproducibility.stage
        if stage >= (3 if older else 2) or again:
            cut = self._cut(excess)
            return RollBack(cut, self.budget.clip_factor, True, stage > 0, older and stage > 0)
        return RollBack(replay=True, leave_out=stage > 0, older=stage > 1)

    def _roll_back(
        self, damaged: bool, diverged: bool, excess: float, replay: bool = False
    ) -> RollBack:
        again = self._on_probation
        self._since_rollback = 0
        self._skips_in_a_row = 0
        if damaged and not diverged and not again:
            # Damage from outside blames neither the learning rate nor the batch.
            return RollBack()
        return self._lower(excess, replay)

    def _lower(self, excess: float, replay: bool) -> RollBack:
        self._since_rollback = 0
        self._skips_in_a_row = 0
        return RollBack(self._cut(excess), self.budget.clip_factor, replay)

    def _in_vain(self, anomaly: Anomaly) -> bool:
        """Whether half the learning rate has led to the same, or nearly, at the very same step."""
        if self.lowered is None:
            return False
        step, value = self.lowered
        return anomaly.step == step and anomaly.value > value / 2

    def regime_change(self) -> None:
        """What was tried was tried on something that is no trouble."""
        self.reproducibility.end()
        self.retried.end()
        self.lowered = self._since_rollback = None
        self._skips_in_a_row = 0

    @property
    def _on_probation(self) -> bool:
        since = self._since_rollback
        return since is not None and since < self.budget.probation

    def _cut(self, excess: float) -> float:
        # An Inf among the weights makes the excess Inf; a factor of 0 would end learning for good.
        return min(self.budget.lr_factor, 1.0 / min(max(1.0, excess), _LARGEST_CUT))

    def _spend(self, sort: str) -> bool:
        if self._left[sort] <= 0:
            return False
        self._left[sort] -= 1
        return True

    @property
    def left(self) -> dict[str, int]:
        """Responses left of each sort."""
        return dict(self._left)

    def state_dict(self) -> dict[str, Any]:
        """What was spent, as plain ints; the budget itself comes from the constructor."""
        return {
            "left": dict(self._left),
            "skips_in_a_row": self._skips_in_a_row,
            "healthy": self._healthy,
            "since_rollback": self._since_rollback,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back, within today's budget."""
        limits = asdict(self.budget)
        self._left = {sort: min(int(n), limits[sort]) for sort, n in state["left"].items()}
        self._skips_in_a_row = int(state["skips_in_a_row"])
        self._healthy = int(state["healthy"])
        since = state["since_rollback"]
        self._since_rollback = None if since is None else int(since)
