"""Detects bad updates: update-to-weight ratio, learning-rate jumps, damaged optimizer state."""

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rolling_window import Window
from lit_stability.measurement.step_stats import StepStats


class _RatioWindow:
    """Keeps the logarithm of update-to-weight ratio over learning rate of accepted steps."""

    shared_by_ranks = "yes"

    def __init__(self, *, ratio: float, floor: float, window: int, min_history: int) -> None:
        require(ratio > 1, "ratio", ratio, "greater than 1")
        require(floor > 0, "floor", floor, "greater than 0")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        self.ratio, self.floor, self.min_history = ratio, floor, min_history
        self.window = Window(window)

    def expected(self, learning_rate: float) -> float:
        """Returns the usual update-to-weight ratio at this learning rate."""
        return math.exp(self.window.median) * learning_rate

    def update(self, stats: StepStats) -> None:
        """Learns from an accepted step."""
        if stats.update_ratio and stats.update_learning_rate > 0:
            self.window.add(math.log(stats.update_ratio / stats.update_learning_rate))

    def optimizer_replaced(self) -> None:
        """Forgets the window: another optimizer moves the weights by other amounts."""
        self.window.replace([])

    def state_dict(self) -> dict[str, Any]:
        """Returns the window."""
        return {"window": list(self.window.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the window."""
        self.window.replace(state["window"])


class UpdateSpike(_RatioWindow):
    """Flags an update that moved the weights far more than its learning rate explains.

    The update-to-weight ratio divided by the learning rate is a spike if it is above ``ratio``
    times its median and, in logarithms, above it by ``sigmas`` robust standard deviations, and the
    weights moved by more than ``floor`` of their norm. The median is multiplied by the growth of
    the gradient over its own median, because plain descent follows its gradient. The flagged update
    was applied one step earlier, so the state is damaged. Healthy optimizers do not cause such
    updates, damaged moments do.

    Args:
        ratio: smallest factor over the median that counts.
        sigmas: smallest excess over the median, in robust standard deviations of the logarithm.
        floor: smallest update-to-weight ratio that counts.
        window: number of accepted values in the window.
        min_history: accepted values before the first verdict.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        ratio: float = 10.0,
        sigmas: float = 8.0,
        floor: float = 0.05,
        window: int = 100,
        min_history: int = 20,
    ) -> None:
        super().__init__(ratio=ratio, floor=floor, window=window, min_history=min_history)
        require(sigmas > 0, "sigmas", sigmas, "greater than 0")
        self.sigmas = sigmas
        self.norms = Window(window)
        self.growth = 1.0
        """Gradient norm of the last step over its median, at least 1."""

    def update(self, stats: StepStats) -> None:
        """Learns from an accepted step, and how much its gradient exceeds the median."""
        super().update(stats)
        if 0 < stats.grad_norm < math.inf:
            self.norms.add(math.log(stats.grad_norm))
            self.growth = max(1.0, stats.grad_norm / math.exp(self.norms.median))

    def state_dict(self) -> dict[str, Any]:
        """Returns the windows, and the growth of the last gradient."""
        norms = list(self.norms.values)
        return {**super().state_dict(), "norms": norms, "growth": self.growth}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state)
        self.norms.replace(state["norms"])
        self.growth = float(state["growth"])

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if the previous update was a spike."""
        moved = stats.update_ratio
        if moved is None or stats.update_learning_rate <= 0 or len(self.window) < self.min_history:
            return None
        if moved <= self.floor:
            return None
        # A cut of ours must not make the same move look less explained.
        rate = max(stats.update_learning_rate, stats.update_nominal_learning_rate)
        expected = self.expected(rate) * self.growth
        if moved <= self.ratio * expected:
            return None
        above = math.log(moved / expected) if expected > 0 else math.inf
        if above <= self.sigmas * self.window.sigma:
            return None
        message = "the last update made weights non-finite"
        if math.isfinite(moved):
            times = moved / expected if expected > 0 else math.inf
            message = (
                f"the last update moved the weights by {moved:.2g} of their norm, "
                f"{times:.0f} times what its learning rate and gradient explain"
            )
        return Anomaly(
            kind="update spike",
            step=stats.step,
            value=moved,
            signal="update_ratio",
            baseline=expected,
            threshold=max(self.floor, self.ratio * expected),
            optimizer=stats.optimizer,
            state_corrupted=True,
            replay_first=True,
            since=max(0, stats.step - 1),
            message=message,
        )


class LearningRateJump(_RatioWindow):
    """Flags, before the step, a learning rate that would damage the weights.

    Two conditions must hold: the learning rate of a group is above ``ratio`` times the largest of
    its accepted steps, *and* the update-to-weight ratio that it predicts is above ``floor``. The
    second one spares warm restarts and warm-ups that start from almost 0.

    Args:
        ratio: smallest factor over the largest accepted learning rate that counts.
        floor: smallest predicted update-to-weight ratio that counts.
        window: number of accepted values in the window.
        min_history: accepted values before the first verdict.
    """

    def __init__(
        self, *, ratio: float = 10.0, floor: float = 0.1, window: int = 100, min_history: int = 20
    ) -> None:
        super().__init__(ratio=ratio, floor=floor, window=window, min_history=min_history)
        self.largest: list[float] = []
        """Largest accepted learning rate of each group."""
        self.last: list[float] = []
        """Last accepted learning rate of each group."""

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if a learning rate jumps to a dangerous value."""
        rates = stats.learning_rates
        if len(self.window) < self.min_history or len(rates) != len(self.largest):
            return None
        jump = max((r / b for r, b in zip(rates, self.largest, strict=True) if b > 0), default=0.0)
        if jump <= self.ratio:
            return None
        predicted = self.expected(max(rates))
        pairs = zip(self.last, rates, strict=True)
        if predicted <= self.floor:
            return None
        return Anomaly(
            kind="learning-rate jump",
            step=stats.step,
            value=max(rates),
            signal="learning_rate",
            baseline=max(self.largest),
            threshold=self.ratio * max(self.largest),
            optimizer=stats.optimizer,
            # No factor makes an infinite learning rate finite.
            hold=tuple(min(1.0, last / r) if r > 0 else 1.0 for last, r in pairs)
            if math.isfinite(max(rates))
            else (),
            message=f"learning rate {max(rates):.3g} is {jump:.0f} times the largest the run has "
            f"tolerated; the update would move the weights by {predicted:.2g} of their norm",
        )

    def update(self, stats: StepStats) -> None:
        """Learns the last update, and the learning rates of the accepted step."""
        super().update(stats)
        rates = stats.learning_rates
        if len(rates) != len(self.largest):
            self.largest = list(rates)
        self.largest = [max(r, b) for r, b in zip(rates, self.largest, strict=True)]
        self.last = list(rates)

    def optimizer_replaced(self) -> None:
        """Forgets the learning rates too, which mean something else for another optimizer."""
        super().optimizer_replaced()
        self.largest, self.last = [], []

    def state_dict(self) -> dict[str, Any]:
        """Returns the window, and the largest and last learning rate of each group."""
        return {**super().state_dict(), "borne": list(self.largest), "last": list(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state)
        self.largest = list(state["borne"])
        self.last = list(state["last"])


class OptimizerState:
    """Flags a non-finite momentum, and a second moment that changed by more than it can.

    ``v_t = b v_(t-1) + (1 - b) g^2`` can never be below ``b v_(t-1)`` (Kingma & Ba 2015,
    Algorithm 1), and its sum never above ``b sum(v_(t-1)) + (1 - b) |g|^2``; so it is with RMSprop
    and Adadelta, and with Adagrad, where both factors are 1. A sampled sum below
    ``share`` of the first, above ``excess`` times the second, or a non-finite one, was damaged from
    outside. The bounds are exact: on an undamaged optimizer there is no false alarm.

    Args:
        share: smallest tolerated share of the decayed sum; below 1 because bf16 rounds.
        excess: largest tolerated factor on the upper bound; hooks that run later may still enlarge
            the gradient, tenfold by default.

    Raises:
        ValueError: if ``share`` is not in (0, 1), or ``excess`` not above 1.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> zeroed = StepStats(step=1, loss=1.0, grad_norm=1.0, moment_ratio=0.0, moment_name="w")
    >>> OptimizerState().check(zeroed).kind
    'optimizer state'
    """

    shared_by_ranks = "yes"

    def __init__(self, share: float = 0.5, excess: float = 100.0) -> None:
        require(0 < share < 1, "share", share, "in (0, 1)")
        require(excess > 1, "excess", excess, "above 1")
        self.share, self.excess = share, excess

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if momentum or second moment is damaged."""
        ratio, name, bound = stats.moment_ratio, stats.moment_name, self.share
        if stats.bad_momentum:
            ratio, name, damage = math.nan, stats.bad_momentum[0], "momentum is non-finite"
        elif stats.moment_growth is not None and stats.moment_growth > self.excess:
            ratio, name, bound = stats.moment_growth, stats.moment_growth_name, self.excess
            damage = f"second moment is {ratio:.3g} times the most that the last gradient explains"
        elif ratio is None or ratio >= self.share:
            return None
        elif math.isnan(ratio):
            damage = "second moment is non-finite"
        else:
            damage = f"second moment is {ratio:.3g} of what decay alone would leave"
        return Anomaly(
            kind="optimizer state",
            step=stats.step,
            value=ratio,
            signal="moment_ratio",
            baseline=1.0,
            threshold=bound,
            optimizer=stats.optimizer,
            state_corrupted=True,
            since=max(0, stats.step - 1),
            layers=((name, ratio),),
            message=f"the {damage} in {name}: it was damaged from outside",
        )

    def update(self, stats: StepStats) -> None:
        """Does nothing: the bound is fixed."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: the detector has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state to restore."""
