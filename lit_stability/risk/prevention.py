"""Which preventive responses a risk asks for, each once, and when they are taken back.

A state machine over floats: neither torch nor Lightning. It is monotone state: a rollback never
rewinds it, and a checkpoint carries it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_stability.detectors.anomaly import require
from lit_stability.throttle import Throttle

Response = Literal["save", "slow", "precision", "stop"]
RESPONSES: tuple[Response, ...] = get_args(Response)

_FLOOR = 1 / 64
"""The learning rate is not lowered below this share of the scheduled one."""
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
    """What is to be done after a step."""

    due: tuple[Response, ...] = ()
    relaxed: str | None = None
    """What has come back of learning rate and clip, in words."""
    over: bool = False
    """Whether the episode has ended with this step."""


class Prevention:
    """From a risk per step to responses.

    An episode begins with a risk that reaches a level and is over after ``horizon`` steps below
    all levels. Each response is given once in it; only the learning rate is halved again, where
    ``horizon`` steps after a cut the risk still asks for it, down to a 64th. After ``relax_after``
    steps below all levels learning rate and clip are doubled, until they are back. A cut that
    comes soon after a relaxation doubles that wait, to 16 times at most; once all has been back
    for as long as 10 waits, it is what it was.

    Args:
        levels: of risk.
        horizon: steps, what the risk looks ahead.
        relax_after: steps.

    Raises:
        ValueError: if an argument is less than 1.

    >>> p = Prevention(RiskLevels(), horizon=2, relax_after=2)
    >>> [p.step(risk).due for risk in (0.1, 0.4, 0.6, 0.6, 0.1)]
    [(), ('save',), ('slow',), (), ()]
    >>> p.step(0.1)
    Decision(due=(), relaxed='learning rate and clip are back to normal', over=True)
    """

    def __init__(self, levels: RiskLevels, *, horizon: int = 20, relax_after: int = 20) -> None:
        require(horizon >= 1, "horizon", horizon, "at least 1")
        require(relax_after >= 1, "relax_after", relax_after, "at least 1")
        self.levels, self.horizon, self.relax_after = levels, horizon, relax_after
        self.throttle = Throttle(relax_after)
        self.given: tuple[Response, ...] = ()
        """Responses of the episode at hand; empty outside of one."""
        self._calm = 0
        """Steps below all levels in a row."""
        self._since_cut = 0
        self._relaxed = False
        """Whether the last change of the factors was a relaxation."""

    def step(self, risk: float) -> Decision:
        """Take up the risk of a step."""
        reached = self.levels.reached(risk)
        self._since_cut += 1
        if not reached:
            return self._below()
        self._calm = 0
        self.throttle.disturbed()
        due = tuple(r for r in reached if r not in self.given)
        if "slow" in reached and "slow" not in due and self._since_cut >= self.horizon:
            due = tuple(r for r in reached if r in due or r == "slow")
        if "slow" in due and self.throttle.lr_factor <= _FLOOR:
            due = tuple(r for r in due if r != "slow")
        self.given = tuple(r for r in RESPONSES if r in self.given or r in due)
        if "slow" in due:
            self._cut()
        return Decision(due)

    def _cut(self) -> None:
        if self._relaxed:
            longest = _LONGEST * self.relax_after
            self.throttle.relax_after = min(2 * self.throttle.relax_after, longest)
        self.throttle.cut(0.5, 0.5)
        self._since_cut, self._relaxed = 0, False

    def _below(self) -> Decision:
        self._calm += 1
        relaxed = self.throttle.calm(0, ())
        self._relaxed = self._relaxed or relaxed is not None
        if not self.throttle.active and self._calm >= 10 * self.throttle.relax_after:
            self.throttle.relax_after, self._relaxed = self.relax_after, False
        over = bool(self.given) and self._calm >= self.horizon
        if over:
            self.given = ()
        return Decision(relaxed=relaxed, over=over)

    def state_dict(self) -> dict[str, Any]:
        """The episode and the factors in force, in plain values."""
        return {
            "throttle": self.throttle.state_dict(),
            "wait": self.throttle.relax_after,
            "given": list(self.given),
            "calm": self._calm,
            "since_cut": self._since_cut,
            "relaxed": self._relaxed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""
        self.throttle.load_state_dict(state["throttle"])
        self.throttle.relax_after = max(int(state["wait"]), self.relax_after)
        self.given = tuple(r for r in RESPONSES if r in state["given"])
        self._calm, self._since_cut = int(state["calm"]), int(state["since_cut"])
        self._relaxed = bool(state["relaxed"])
