"""Chooses preventive responses to a risk, each once per episode, and undoes them when it is calm.

Imports neither torch nor Lightning. A rollback does not restore its state; checkpoints contain it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_stability.detectors.anomaly import require
from lit_stability.policies.crash_risk.lr_cap import LearningRateCap, Rates

Response = Literal["save", "slow", "precision", "stop"]
RESPONSES: tuple[Response, ...] = get_args(Response)

_LONGEST = 16
"""Largest wait before a relaxation, in multiples of ``relax_after``."""


@dataclass(frozen=True, kw_only=True)
class RiskLevels:
    """Smallest risk that causes each response; None for never.

    Raises:
        ValueError: if a level is not in (0, 1], or the levels are not ascending.
    """

    save: float | None = 0.3
    """Save a checkpoint."""
    slow: float | None = 0.5
    """Halve the learning rate and the clip."""
    precision: float | None = 0.7
    """Compute in float32, if training is in mixed precision."""
    stop: float | None = None
    """End the fit. Off by default: a wrong stop costs more than a late one."""

    def __post_init__(self) -> None:
        before = 0.0
        for name in RESPONSES:
            level = getattr(self, name)
            if level is None:
                continue
            require(0 < level <= 1, name, level, "in (0, 1], or None")
            require(level >= before, name, level, f"at least the previous level, {before:g}")
            before = level

    def reached(self, risk: float) -> tuple[Response, ...]:
        """Returns the responses whose level a risk reaches, the mildest first.

        >>> RiskLevels().reached(0.6), RiskLevels(save=None).reached(0.4)
        (('save', 'slow'), ())
        """
        levels = [(name, getattr(self, name)) for name in RESPONSES]
        return tuple(name for name, level in levels if level is not None and risk >= level)


@dataclass(frozen=True)
class Decision:
    """What `Prevention` decides after a step; a callback carries out the responses."""

    due: tuple[Response, ...] = ()
    """Responses to carry out now."""
    raised: bool = False
    """Whether the bounds on learning rate and clip were raised or removed."""
    over: bool = False
    """Whether the episode ended with this step."""


class Prevention:
    """Chooses responses from the risk of each step.

    An episode begins when the risk reaches a level and ends after ``horizon`` steps below all
    levels. Each response is given once per episode. Only the learning rate is halved again, if the
    risk is still high ``horizon`` steps after a cut, down to a 64th of the schedule.

    A cut caps the learning rate at half its current value, whatever the scheduler sets later, and
    halves the clip. After ``relax_after`` steps below all levels both bounds are raised by half,
    repeatedly, until they have no effect. A cut after a raise doubles the wait, to 16 times
    ``relax_after`` at most; after 10 waits without a bound the wait is ``relax_after`` again.

    Args:
        levels: of risk.
        horizon: horizon of the risk, in steps.
        relax_after: steps below all levels before the bounds are raised.

    Raises:
        ValueError: if an argument is less than 1.

    >>> p = Prevention(RiskLevels(), horizon=2, relax_after=2)
    >>> [p.step(risk, {0: [1.0]}).due for risk in (0.1, 0.4, 0.6, 0.6, 0.1)]
    [(), ('save',), ('slow',), (), ()]
    >>> p.factors({0: [1.0]})
    {0: (0.5,)}
    >>> p.step(0.1, {0: [1.0]}).over, p.factors({0: [2.0]})
    (True, {0: (0.375,)})
    """

    def __init__(self, levels: RiskLevels, *, horizon: int = 20, relax_after: int = 20) -> None:
        require(horizon >= 1, "horizon", horizon, "at least 1")
        require(relax_after >= 1, "relax_after", relax_after, "at least 1")
        self.levels, self.horizon, self.relax_after = levels, horizon, relax_after
        self.given: tuple[Response, ...] = ()
        """Responses of the current episode; empty outside of one."""
        self.clip_factor = 1.0
        """Ratio of clipping threshold to twice the median gradient norm; 1 means no clipping."""
        self._lr_cap = LearningRateCap()
        self._wait = relax_after
        self._calm = 0
        """Consecutive steps below all levels."""
        self._since_cut = 0
        self._raised = False
        """Whether the last change of the bounds was upwards."""

    def factors(self, scheduled: Rates) -> dict[int, tuple[float, ...]]:
        """Returns the factor in (0, 1] on each scheduled learning rate."""
        return self._lr_cap.factors(scheduled)

    def step(self, risk: float, scheduled: Rates) -> Decision:
        """Decides the responses to the risk of a step.

        Args:
            risk: in [0, 1].
            scheduled: learning rates that the schedulers set.
        """
        reached = self.levels.reached(risk)
        self._since_cut += 1
        if not reached:
            return self._below(scheduled)
        self._calm = 0
        due = tuple(r for r in reached if self._is_due(r, scheduled))
        self.given = tuple(r for r in RESPONSES if r in self.given or r in due)
        if "slow" in due:
            self._cut(scheduled)
        return Decision(due)

    def _is_due(self, response: Response, scheduled: Rates) -> bool:
        if response != "slow":
            return response not in self.given
        allowed = response not in self.given or self._since_cut >= self.horizon
        return allowed and self._lr_cap.can_lower(scheduled)

    def _cut(self, scheduled: Rates) -> None:
        if self._raised:
            self._wait = min(2 * self._wait, _LONGEST * self.relax_after)
        self._lr_cap.lower(scheduled)
        self.clip_factor /= 2
        self._since_cut, self._raised = 0, False

    def _below(self, scheduled: Rates) -> Decision:
        self._calm += 1
        bound = self._lr_cap.active or self.clip_factor < 1
        raised = bound and self._calm % self._wait == 0
        if raised:
            self._lr_cap.raise_(scheduled)
            self.clip_factor = min(1.0, 1.5 * self.clip_factor)
            self._raised = True
        elif not bound and self._calm >= 10 * self._wait:
            self._wait, self._raised = self.relax_after, False
        over = bool(self.given) and self._calm >= self.horizon
        if over:
            self.given = ()
        return Decision(raised=raised, over=over)

    def state_dict(self) -> dict[str, Any]:
        """Returns the episode and the current bounds as plain values."""
        return {
            "given": list(self.given),
            "clip_factor": self.clip_factor,
            "ceiling": self._lr_cap.state_dict(),
            "wait": self._wait,
            "calm": self._calm,
            "since_cut": self._since_cut,
            "raised": self._raised,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.given = tuple(r for r in RESPONSES if r in state["given"])
        self.clip_factor = float(state["clip_factor"])
        self._lr_cap.load_state_dict(state["ceiling"])
        self._wait = max(int(state["wait"]), self.relax_after)
        self._calm, self._since_cut = int(state["calm"]), int(state["since_cut"])
        self._raised = bool(state["raised"])
