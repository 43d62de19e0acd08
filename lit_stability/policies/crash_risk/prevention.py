"""Which preventive responses a risk asks for, each once, and when they are taken back.

A state machine over floats: neither torch nor Lightning. It is monotone state: a rollback never
rewinds it, and a checkpoint carries it.
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
"""Times ``relax_after`` that a relaxation is put off at most."""


@dataclass(frozen=True, kw_only=True)
class RiskLevels:
    """The risk from which on each response is given; None for never.

    Raises:
        ValueError: if a level is not in (0, 1], or they are not in order.
    """

    save: float | None = 0.3
    """Save a checkpoint."""
    slow: float | None = 0.5
    """Halve the learning rate and the clip."""
    precision: float | None = 0.7
    """Compute in float32, where training is in mixed precision."""
    stop: float | None = None
    """End the fit. Off unless asked for: a wrong stop costs more than a late one."""

    def __post_init__(self) -> None:
        before = 0.0
        for name in RESPONSES:
            level = getattr(self, name)
            if level is None:
                continue
            require(0 < level <= 1, name, level, "in (0, 1], or None")
            require(level >= before, name, level, f"at least the level before it, {before:g}")
            before = level

    def reached(self, risk: float) -> tuple[Response, ...]:
        """The responses that a risk asks for, the mildest first.

        >>> RiskLevels().reached(0.6), RiskLevels(save=None).reached(0.4)
        (('save', 'slow'), ())
        """
        levels = [(name, getattr(self, name)) for name in RESPONSES]
        return tuple(name for name, level in levels if level is not None and risk >= level)


@dataclass(frozen=True)
class Decision:
    """What is to be done after a step, as `Prevention` decides it: the responses that are ``due``.

    Each is a value of this package's, for a callback to carry out; an empty tuple is nothing.
    """

    due: tuple[Response, ...] = ()
    raised: bool = False
    """Whether learning rate and clip were let up a little, or altogether."""
    over: bool = False
    """Whether the episode has ended with this step."""


class Prevention:
    """From a risk per step to responses.

    An episode begins with a risk that reaches a level and is over after ``horizon`` steps below
    all levels. Each response is given once in it; only the learning rate is halved again, where
    ``horizon`` steps after a cut the risk still asks for it, and down to a 64th of the schedule.

    A cut binds the learning rate to half of what it is, whatever the scheduler writes from then
    on, and the clip to half. After ``relax_after`` steps below all levels both are raised by half,
    and again, until they bind no more. A cut that follows upon that doubles the wait, to 16 times
    at most; once nothing has been bound for 10 waits it is what it was.

    Args:
        levels: of risk.
        horizon: steps, what the risk looks ahead.
        relax_after: steps.

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
        """Responses of the episode at hand; empty outside of one."""
        self.clip_factor = 1.0
        """Clipping threshold over twice the median gradient norm; 1 means no clipping."""
        self._lr_cap = LearningRateCap()
        self._wait = relax_after
        self._calm = 0
        """Steps below all levels in a row."""
        self._since_cut = 0
        self._raised = False
        """Whether the last change of the bounds was upwards."""

    def factors(self, scheduled: Rates) -> dict[int, tuple[float, ...]]:
        """What to multiply the learning rates that the schedules give by, in (0, 1]."""
        return self._lr_cap.factors(scheduled)

    def step(self, risk: float, scheduled: Rates) -> Decision:
        """Take up the risk of a step.

        Args:
            risk: in [0, 1].
            scheduled: learning rates that the schedules give.
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
        again = response not in self.given or self._since_cut >= self.horizon
        return again and self._lr_cap.can_lower(scheduled)

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
        """The episode and the bounds in force, in plain values."""
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
        """Put such a state back."""
        self.given = tuple(r for r in RESPONSES if r in state["given"])
        self.clip_factor = float(state["clip_factor"])
        self._lr_cap.load_state_dict(state["ceiling"])
        self._wait = max(int(state["wait"]), self.relax_after)
        self._calm, self._since_cut = int(state["calm"]), int(state["since_cut"])
        self._raised = bool(state["raised"])
