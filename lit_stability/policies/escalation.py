"""The escalation policy: chooses the mildest sufficient response within a budget, and stops last.

Imports neither torch nor Lightning. A rollback does not restore its state; checkpoints contain it.

    bad batch, state intact ......... retry the step; if the anomaly recurs, skip the batch; if
                                      the next batch fails too, retry with new random numbers;
                                      if the one after fails too, at the next batch index
    large but finite gradient ....... retry the step; if it recurs, clip it to the usual norm,
                                      and so the rest of the burst; after ten in a row in which the
                                      loss has risen, as a learning rate that is too high
    learning rate jumped ............ hold it at its last accepted value
    weights or moments damaged ...... roll back and replay; if the damage recurs, skip the suspected
                                      batch; then use an older snapshot; then as below
    anomaly during probation ........ roll back with a lower learning rate and a tighter clip
    learning rate likely too high ... the same at once; not again if it did not help
    cause certain, no remedy ........ stop with the cause, once three batches in a row have failed
    every batch fails ............... roll back once, then stop
    budget spent .................... stop with what to try

If data cannot be replayed, a bad batch is skipped at once and a rollback continues with new data.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lit_stability.detectors import Anomaly
from lit_stability.diagnosis import RecommendedAction
from lit_stability.policies.actions import (
    ClipStep,
    HoldLearningRate,
    Response,
    RetryStep,
    RollBack,
    SkipStep,
    Stop,
)
from lit_stability.policies.reproducibility import ReproducibilityCheck, Verdict

_BURST = 5
"""Steps after a clipped one in which another large gradient is clipped without a retry."""
_CLIPS = 10
"""Clipped steps in a row after which a loss that has risen all the same shows that to clip is not
enough."""
_CERTAIN = 3
"""Batches in a row that must fail before a certain cause is one of all batches."""
_MOVED_AFTER = (2, 5, 8)
"""Batches in a row that failed at one batch index when the index is suspected."""
_LARGEST_CUT = 1e3
"""Largest divisor of the learning rate in one rollback."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on the number of responses in a run.

    >>> from lit_stability import stability_callbacks
    >>> suite = stability_callbacks(rollback=dict(budget=Budget(skips=20, rollbacks=3)))

    Raises:
        ValueError: if a number is out of its range.
    """

    skips_in_a_row: int = 10
    """Consecutive skipped steps before the state is suspected and rolled back."""
    skips: int = 100
    rollbacks: int = 8
    holds: int = 8
    refill_skips_every: int = 1
    """Healthy steps that refund one skip: a run in which half of the batches fail can continue."""
    refill_every: int = 500
    """Healthy steps that refund one rollback and one hold."""
    lr_factor: float = 0.5
    """Factor on the learning rate in a rollback during the probation of another."""
    clip_factor: float = 0.5
    """Factor on the clipping threshold in that rollback."""
    probation: int = 50
    """Healthy steps after a rollback during which another rollback lowers the learning rate."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("lr_factor", "clip_factor"):
                if not 0 < value < 1:
                    raise ValueError(f"{name} must be in (0, 1), got {value!r}")
            elif value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")


class EscalationPolicy:
    """Chooses the response to each anomaly and counts the responses against the budget.

    In any sequence of anomalies there are at most ``skips + rollbacks + holds`` responses, plus
    one per ``refill_skips_every`` and two per ``refill_every`` healthy steps, and as many rollbacks
    as have led to a batch that was then left out; a clipped step costs nothing. When one kind of
    response is used up, the next stronger one is chosen, and `Stop` last.

    Args:
        budget: limits of each response; None for the defaults.

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
        """Check of the steps replayed since a snapshot."""
        self.retried = ReproducibilityCheck(slack=0)
        """Check of a single retried step."""
        self.suspects_index = False
        """Whether a batch index was found to fail with any batch: the next one is tried at once."""
        self._failed_at: int | None = None
        """Step at which so many batches in a row failed that the state was rolled back."""
        self._skipped: int | None = None
        """The last step at which a batch was skipped."""
        self._clipped: int | None = None
        """The last step that was clipped."""
        self._clips_in_a_row = 0
        """Clipped steps since the last healthy one or the last rollback."""
        self.lowered: tuple[int, float] | None = None
        """Step and value of the anomaly for which the learning rate, as its cause, was lowered;
        None once that step is healthy."""

    def healthy(self, step: int | None = None) -> Verdict | None:
        """Counts a healthy step; returns the verdict of a check that ends with it, or None."""
        self._skips_in_a_row = self._clips_in_a_row = 0
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
        stage = self.reproducibility.stage
        verdicts = [self.retried.passed(step), self.reproducibility.passed(step)]
        if verdicts[1] == "deterministic" and stage == 1:
            # Leaving out one batch was enough: the rollbacks have found it.
            self._refund_rollbacks(2)
        return next((verdict for verdict in verdicts if verdict is not None), None)

    def returns(self, anomaly: Anomaly, *, state_corrupted: bool) -> bool:
        """Returns whether an anomaly is a recurrence of the one whose steps are run again."""
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
        clippable: bool = False,
        random: bool = True,
        movable: bool = False,
        loss_rose: bool = False,
        recommended_action: RecommendedAction = "usual",
        cause: str = "",
    ) -> Response:
        """Chooses the response to an anomaly and charges it to the budget.

        Args:
            anomaly: the anomaly found by a detector.
            state_corrupted: whether an audit of weights and optimizer state found damage, in
                addition to what the anomaly reports.
            excess: last update-to-weight ratio divided by its healthy baseline; a cut divides the
                learning rate by at least this, up to 1000.
            replay: whether the step, or the steps since the snapshot, can be run again.
            older: whether there is a snapshot before the newest confirmed one.
            adjusted: whether a setting that may be the cause was changed, such as the precision:
                earlier recurrences then no longer count.
            clippable: whether the gradients are still there to be clipped.
            random: whether the step has drawn random numbers.
            movable: whether the batch can be trained on at the index of the batch after it.
            loss_rose: whether the loss is far above its level before the incident.
            recommended_action: what the likely cause recommends; see `lit_stability.diagnosis`.
            cause: name of the likely cause, for the reason of a stop.
        """
        if recommended_action == "stop" and not self._may_be_the_batch(anomaly):
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
            and (anomaly.kind != "gradient spike" or (loss_rose and self._clips_in_a_row >= _CLIPS))
            and not self._lowered_in_vain(anomaly)
            and self._spend("rollbacks")
        ):
            self.reproducibility.end()
            self.lowered = anomaly.step, anomaly.value
            return self._lower(excess, replay)
        if clippable and self.clips(anomaly, damaged=damaged, replay=replay):
            self.retried.end()
            self._skips_in_a_row, self._clipped = 0, anomaly.step
            self._clips_in_a_row += 1
            return ClipStep()
        streak_is_over = self._skips_in_a_row >= self.budget.skips_in_a_row
        if not damaged and not streak_is_over and self._spend("skips"):
            return self._reject_step(anomaly.step, replay, random, movable)
        if streak_is_over and not damaged:
            if self._failed_at is not None and anomaly.step <= self._failed_at:
                batches = 2 * self.budget.skips_in_a_row
                return Stop(f"{batches} batches in a row failed ({anomaly.message})")
            self._failed_at = anomaly.step
        if self._spend("rollbacks"):
            if replay and damaged:
                return self._replay(anomaly, excess, older)
            return self._roll_back(damaged, anomaly.kind == "divergence", excess, replay)
        return Stop(
            f"{anomaly.kind} recurred after {self.budget.rollbacks} rollbacks ({anomaly.message})"
        )

    def clips(self, anomaly: Anomaly, *, damaged: bool = False, replay: bool) -> bool:
        """Returns whether the response to an anomaly is to clip: it is free, and harms nobody.

        A large gradient is no fault while loss and weights come to no harm. If they do, another
        detector flags it.
        """
        if anomaly.kind != "gradient spike" or damaged:
            return False
        goes_on = self._clipped is not None and abs(anomaly.step - self._clipped) <= _BURST
        return goes_on or not replay or self.retried.returns(anomaly.step)

    def _reject_step(self, step: int, replay: bool, random: bool, movable: bool) -> Response:
        # A batch was skipped at this step and the next one fails too, with the same random numbers.
        draw_is_suspect = random and step == self._skipped
        if replay and not self.retried.returns(step):
            self.retried.begin(step)
            # A skipped batch leaves its index to the next. One change at a time shows the cause.
            several = step == self._skipped and self._skips_in_a_row in _MOVED_AFTER
            move = movable and (several or self.suspects_index)
            return RetryStep(draw_is_suspect and not move, move)
        self.retried.end()
        self._skips_in_a_row += 1
        self._skipped = step
        if self.reproducibility.active:
            # The rollback has led to the batch that is to blame: it counts towards no stop.
            self.reproducibility.end()
            self._refund_rollbacks(1)
        # Without a retry there is less to go by: the batches themselves may be bad.
        return SkipStep(draw_is_suspect and not replay and self._skips_in_a_row > _CERTAIN)

    def _may_be_the_batch(self, anomaly: Anomaly) -> bool:
        """Returns whether a certain cause may concern single batches, which are left out then."""
        return anomaly.signal in ("loss", "gradient") and self._skips_in_a_row < _CERTAIN

    def _refund_rollbacks(self, count: int) -> None:
        self._left["rollbacks"] = min(self._left["rollbacks"] + count, self.budget.rollbacks)

    def _replay(self, anomaly: Anomaly, excess: float, older: bool) -> RollBack:
        from_training = anomaly.kind in ("divergence", "update spike")
        lower = (
            self._on_probation and from_training and not self.reproducibility.returns(anomaly.step)
        )
        self.reproducibility.begin(anomaly.step)
        self._since_rollback = 0
        self._skips_in_a_row = 0
        stage = self.reproducibility.stage
        if stage >= (3 if older else 2) or lower:
            cut = self._cut(excess)
            return RollBack(cut, self.budget.clip_factor, True, stage > 0, older and stage > 0)
        return RollBack(replay=True, skip_suspect=stage > 0, older=stage > 1)

    def _roll_back(
        self, damaged: bool, diverged: bool, excess: float, replay: bool = False
    ) -> RollBack:
        on_probation = self._on_probation
        self._since_rollback = 0
        self._skips_in_a_row = 0
        if damaged and not diverged and not on_probation:
            # Damage from outside is evidence against neither the learning rate nor the batch.
            return RollBack()
        return self._lower(excess, replay)

    def _lower(self, excess: float, replay: bool) -> RollBack:
        self._since_rollback = 0
        self._skips_in_a_row = self._clips_in_a_row = 0
        return RollBack(self._cut(excess), self.budget.clip_factor, replay)

    def _lowered_in_vain(self, anomaly: Anomaly) -> bool:
        """Returns whether a lower learning rate led to nearly the same anomaly at the same step."""
        if self.lowered is None:
            return False
        step, value = self.lowered
        return anomaly.step == step and anomaly.value > value / 2

    def regime_change(self) -> None:
        """Ends all checks and the probation, as the anomalies so far are accepted as normal."""
        self.reproducibility.end()
        self.retried.end()
        self.lowered = self._since_rollback = None
        self._skips_in_a_row = 0

    @property
    def _on_probation(self) -> bool:
        since = self._since_rollback
        return since is not None and since < self.budget.probation

    def _cut(self, excess: float) -> float:
        # An Inf among the weights makes the excess Inf; a factor of 0 would end learning.
        return min(self.budget.lr_factor, 1.0 / min(max(1.0, excess), _LARGEST_CUT))

    def _spend(self, kind: str) -> bool:
        if self._left[kind] <= 0:
            return False
        self._left[kind] -= 1
        return True

    @property
    def left(self) -> dict[str, int]:
        """Number of responses left, by kind."""
        return dict(self._left)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters as plain numbers; the budget comes from the constructor."""
        return {
            "left": dict(self._left),
            "skips_in_a_row": self._skips_in_a_row,
            "healthy": self._healthy,
            "since_rollback": self._since_rollback,
            "skipped": self._skipped,
            "clipped": self._clipped,
            "failed_at": self._failed_at,
            "suspects_index": self.suspects_index,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the counters, limited by the current budget."""
        limits = asdict(self.budget)
        self._left = {kind: min(int(n), limits[kind]) for kind, n in state["left"].items()}
        self._skips_in_a_row = int(state["skips_in_a_row"])
        self._healthy = int(state["healthy"])
        since = state["since_rollback"]
        self._since_rollback = None if since is None else int(since)
        self._skipped, self._clipped = state.get("skipped"), state.get("clipped")
        self._failed_at = state.get("failed_at")
        self.suspects_index = bool(state.get("suspects_index", False))
