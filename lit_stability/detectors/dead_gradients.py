"""Detects parameters whose gradient is exactly 0 while that of others is not."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.trends import ROUNDING
from lit_stability.measurement.step_stats import StepStats

_NO_GAIN = ("bias", "beta", "b")
"""Last name parts of parameters that may be 0 in a healthy model and do not block gradients."""


class DeadGradients:
    """Warns, once per parameter, of gradients that stay exactly 0.

    A zero-initialised gain or branch blocks the gradient of the layers before it for a few steps,
    and an expert that is not chosen has none for a while. A parameter is therefore dead only when
    its gradient was exactly 0 for ``persist`` consecutive steps, with a learning rate above 0 and a
    gradient elsewhere, and for ``patience`` times its longest earlier stretch of zeros. A step
    without any gradient, or with a non-finite one, neither counts nor resets the count, nor does
    one whose gradients are rounding errors, a millionth of the largest, as in a run that has
    converged. A parameter that has never had a gradient, in a module whose other parameters (biases
    aside) have one, is not dead but unused by the data, like the vector of a mask token.

    The cause usually lies after the last dead parameter: a gain of 0, a detached output, a
    saturated or masked branch. A weight (not a bias) that was exactly 0 at the last scan and has no
    gradient that could move it is named first, and ``signal`` is ``weight_norm`` instead of
    ``grad_norm``. ``value`` is the share of dead parameters.

    Args:
        persist: consecutive steps with a gradient of exactly 0.
        patience: factor on the longest earlier stretch of zeros of the same parameter.

    Raises:
        ValueError: if an argument is out of its range.

    >>> d = DeadGradients(persist=3)
    >>> for i in range(5):
    ...     stats = StepStats(step=i, loss=1.0, grad_norm=0.5, names=("body.w", "head.w"),
    ...                       grad_norms=(0.0, 0.5), learning_rates=(0.1,))
    ...     if anomaly := d.check(stats):
    ...         print(i, anomaly.message)
    ...     d.update(stats)
    2 body.w has had a gradient of exactly 0 for 3 steps; the next with a gradient is head.w
    """

    def __init__(self, *, persist: int = 50, patience: float = 10.0) -> None:
        require(persist >= 1, "persist", persist, "at least 1")
        require(patience >= 1, "patience", patience, "at least 1")
        self.persist, self.patience = persist, patience
        self._zero_for: dict[str, int] = {}
        self._longest: dict[str, int] = {}
        """Longest stretch of zeros that has ended, by parameter."""
        self._reported: set[str] = set()
        self._never: set[str] | None = None
        """Parameters without a gradient so far; None before the first step."""
        self._zero_weights: tuple[str, ...] = ()
        self._largest = 0.0
        """Largest gradient norm so far."""

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if a parameter that is not reported yet is dead."""
        if not (self._zero_for or 0.0 in stats.grad_norms) or not self._counts(stats):
            return None
        dead = self._dead(stats)
        if all(name in self._reported for name in dead):
            return None
        live = [n for n, norm in zip(stats.names, stats.grad_norms, strict=True) if norm > 0]
        blocking = [n for n in self._zero_weights if n not in live]
        return Anomaly(
            kind="dead gradients",
            step=stats.step,
            value=len(dead) / len(stats.names),
            signal="weight_norm" if blocking else "grad_norm",
            baseline=0.0,
            threshold=0.0,
            optimizer=stats.optimizer,
            warn_only=True,
            layers=tuple((n, 0.0) for n in dict.fromkeys([*blocking[:3], *dead]))[:8],
            message=self._message(stats.names, dead, blocking),
        )

    def _dead(self, stats: StepStats) -> list[str]:
        """Returns the parameters whose gradient has been 0 for long enough, this step included."""
        dead = [
            name
            for name, norm in zip(stats.names, stats.grad_norms, strict=True)
            if norm == 0 and self._zero_for.get(name, 0) + 1 >= self._needed(name)
        ]
        if not dead:
            return []
        norms = zip(stats.names, stats.grad_norms, strict=True)
        used = {_module(n) for n, norm in norms if norm > 0 and not n.endswith("bias")} - {""}
        never = self._never or set()
        return [n for n in dead if not (n in never and _module(n) in used)]

    def _needed(self, name: str) -> float:
        return max(self.persist, self.patience * self._longest.get(name, 0))

    def _message(self, names: Sequence[str], dead: list[str], blocking: list[str]) -> str:
        after = names[names.index(dead[-1]) + 1 :]
        if len(dead) == 1:
            which = f"{dead[0]} has"
        else:
            which = f"{len(dead)} of {len(names)} parameters, {dead[0]} to {dead[-1]}, have"
        text = f"{which} had a gradient of exactly 0 for {self.persist} steps"
        if blocking:
            return f"{text}; {blocking[0]} is exactly 0 itself and blocks the gradient"
        if after:
            return f"{text}; the next with a gradient is {after[0]}"
        return text

    def update(self, stats: StepStats) -> None:
        """Learns from an accepted step how long each gradient has been 0."""
        if stats.weight_norms:
            self._zero_weights = tuple(
                n for n, v in stats.weight_norms if v == 0 and n.split(".")[-1] not in _NO_GAIN
            )
        if not self._counts(stats):
            return
        self._largest = max(self._largest, stats.grad_norm)
        if self._never is None:
            pairs = zip(stats.names, stats.grad_norms, strict=True)
            self._never = {name for name, norm in pairs if norm == 0}
        if not (self._zero_for or 0.0 in stats.grad_norms):
            return
        self._reported.update(self._dead(stats))
        for name, norm in zip(stats.names, stats.grad_norms, strict=True):
            if norm == 0:
                self._zero_for[name] = self._zero_for.get(name, 0) + 1
            elif name in self._zero_for:
                self._never.discard(name)
                self._longest[name] = max(self._zero_for.pop(name), self._longest.get(name, 0))
                self._reported.discard(name)

    def _counts(self, stats: StepStats) -> bool:
        moves = not stats.learning_rates or max(stats.learning_rates) > 0
        return moves and stats.finite_gradients and stats.grad_norm > ROUNDING * self._largest

    def state_dict(self) -> dict[str, Any]:
        """Returns the stretches of zeros by parameter, and which were reported."""
        return {
            "zero_for": dict(self._zero_for),
            "longest": dict(self._longest),
            "told": sorted(self._reported),
            "never": None if self._never is None else sorted(self._never),
            "zero_weights": list(self._zero_weights),
            "largest": self._largest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._zero_for, self._longest = dict(state["zero_for"]), dict(state["longest"])
        self._reported, self._zero_weights = set(state["told"]), tuple(state["zero_weights"])
        self._never = None if state["never"] is None else set(state["never"])
        self._largest = float(state.get("largest", 0.0))


def _module(name: str) -> str:
    return name.rpartition(".")[0]
