"""Detects weights that changed by more than their updates explain."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.measurement.step_stats import StepStats, WeightMoves

_ADAM = 4.0
"""Bound on an update of Adam in learning rates: at most (1 - b1) / sqrt(1 - b2) (Kingma & Ba 2015,
section 2.1), 3.2 by default."""
_ELEMENT = 0.1
"""Smallest move of a sampled element that counts, as a share of the largest element."""
_TINY = 1e-30
_Columns: TypeAlias = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
_Measure = Literal["norm", "largest element", "single element"]


class _Change(NamedTuple):
    """Change of one measure of one weight between two scans."""

    measure: _Measure
    name: str
    before: float
    now: float
    distance: float
    """How far the weight moved in this measure, without the element that moved farthest."""
    scale: float
    """Value that a relative change refers to."""

    @property
    def key(self) -> str:
        return f"{self.measure} of {self.name}"

    @property
    def size(self) -> float:
        return abs(self.now - self.before)

    def text(self) -> str:
        if self.measure == "single element":
            return f"a {self.key} has moved by {self.now:.4g}"
        return f"the {self.key} went from {self.before:.4g} to {self.now:.4g}"


class WeightCorruption:
    """Flags a weight that changed by more than all updates since the last scan explain.

    Neither the norm of a tensor nor its largest absolute value can change by more than the tensor
    moved in that measure (triangle inequality), and no element moves far more than all others. A
    larger change came from outside the optimizer: faulty memory, a stray write, a flipped bit. The
    move of a tensor is estimated from a sample, without the element that moved farthest. The sample
    may miss the few rows of an embedding that moved, so the change must exceed all of

    * ``slack`` times the move of the sample,
    * ``ratio`` times the largest recent change, per unit of learning rate, and per unit of learning
      rate times gradient norm,
    * for norms and largest values ``slack`` times the sum of learning rate times gradient norm,
      which is the reach of gradient descent; for elements under Adam four times the sum of
      learning rates,
    * ``floor`` of the value before; for a single element, a tenth of the largest value.

    A change that recurs when the same steps are replayed comes from the run's own code: that weight
    is not judged any more, which is counted in ``regimes``. In tensors of more than 512 elements, a
    corrupted element that stays below the largest one is found only if it is in the sample.

    Args:
        slack: factor on the move of the sample, and on the reach of gradient descent.
        ratio: factor on the largest recent change, at least 1.
        floor: smallest relative change that counts; fp32 norms are exact to about 1e-5.
        min_history: changes of a weight before the first verdict on it; a weight that has never
            moved is never judged.

    Raises:
        ValueError: if an argument is out of its range.

    >>> detector = WeightCorruption(min_history=2)
    >>> norms = [1.0, 1.01, 1.02, 1.03, 1.9]
    >>> for i, (before, now) in enumerate(zip(norms, norms[1:])):
    ...     moves = WeightMoves(since=10 * i, norms=(before,), peaks=((0.3, 0.3),),
    ...                         distances=(0.02,), farthest=((0.01, 0.01),))
    ...     stats = StepStats(step=10 * i + 10, loss=1.0, grad_norm=1.0, weight_moves=moves,
    ...                       weight_norms=(("w", now),), learning_rates=(0.01,))
    ...     if anomaly := detector.check(stats):
    ...         print(anomaly.step, anomaly.message)
    ...     detector.update(stats)
    40 the norm of w went from 1.03 to 1.9 since step 30, which no update explains
    """

    def __init__(
        self,
        *,
        slack: float = 3.0,
        ratio: float = 10.0,
        floor: float = 1e-3,
        min_history: int = 3,
    ) -> None:
        require(slack >= 1, "slack", slack, "at least 1")
        require(ratio >= 1, "ratio", ratio, "at least 1")
        require(floor > 0, "floor", floor, "greater than 0")
        require(min_history >= 1, "min_history", min_history, "at least 1")
        self.slack, self.ratio, self.floor = slack, ratio, floor
        self.min_history = min_history
        self.regimes = 0
        self._reach: dict[_Measure, dict[str, list[float]]] = {}
        """By measure and weight: number of changes, and the largest recent change per learning rate
        and per learning rate times gradient norm."""
        self._rates = 0.0
        """Sum of the learning rates since the last scan."""
        self._pulls: dict[str, float] = {}
        """Sums of learning rate times gradient norm since the last scan."""
        self._adaptive = False
        """Whether the optimizer has second moments."""
        self._reported: dict[str, int] = {}
        self._accepted: set[str] = set()
        """Weights whose change has recurred: the program writes them."""

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if a scan finds a change that no update explains."""
        moves = stats.weight_moves
        if moves is None:
            return None
        unexplained = [c for c in self._large(stats, moves) if self._is_unexplained(c)]
        corrupted = [c for c in unexplained if not self._has_recurred(c, moves.since)]
        if not corrupted:
            return None
        self._reported |= {change.key: stats.step for change in corrupted}
        worst = max(corrupted, key=lambda change: change.size / self._explained(change))
        return Anomaly(
            kind="weight corruption",
            step=stats.step,
            value=worst.now,
            signal="weight_norm",
            baseline=worst.before,
            threshold=worst.before + self._explained(worst),
            optimizer=stats.optimizer,
            state_corrupted=True,
            since=moves.since,
            layers=tuple({c.name: c.now for c in corrupted}.items())[:5],
            message=f"{worst.text()} since step {moves.since}, which no update explains",
        )

    def _large(self, stats: StepStats, moves: WeightMoves) -> Iterator[_Change]:
        """Yields the changes beyond the cheap bounds, which nearly all changes meet."""
        slack, floor = self.slack, self.floor
        names = [name for name, _ in stats.weight_norms]
        for measure, columns in _columns(stats, moves):
            for row in zip(names, *columns, strict=True):
                size = abs(row[2] - row[1])
                if size <= slack * row[3] or size <= floor * row[4]:
                    continue
                if measure != "single element" or size > _ELEMENT * row[4]:
                    yield _Change(measure, *row)

    def _is_unexplained(self, change: _Change) -> bool:
        known = self._reach.get(change.measure, {}).get(change.name)
        if known is None or known[0] < self.min_history or not math.isfinite(change.size):
            return False
        return change.size > self._explained(change)

    def _explained(self, change: _Change) -> float:
        """Returns the largest change that learning rates and gradients since the scan explain."""
        _, by_rate, by_pull = self._reach[change.measure][change.name]
        by_pull *= self.ratio
        by_rate *= self.ratio
        if change.measure != "norm" and self._adaptive:
            by_rate = max(by_rate, _ADAM)
        elif change.measure != "single element":
            # A weight that moved little so far may still move as far as gradient descent allows.
            by_pull = max(by_pull, self.slack)
        return max(by_rate * self._rates, by_pull * self._pulls.get(change.name, 0.0), _TINY)

    def _has_recurred(self, change: _Change, since: int) -> bool:
        if change.name in self._accepted:
            return True
        if since >= self._reported.get(change.key, -1):
            return False
        self._accepted.add(change.name)
        self.regimes += 1
        return True

    def update(self, stats: StepStats) -> None:
        """Learns the changes of the weights, and the gradients that move them next."""
        if stats.weight_norms:
            if stats.weight_moves is not None and self._rates > 0:
                self._learn(stats, stats.weight_moves)
            # Momentum keeps earlier gradients: 0.9 to the power of ten.
            self._pulls = {name: 0.35 * pull for name, pull in self._pulls.items()}
            self._rates = 0.0
        if not stats.finite_gradients:
            return
        self._adaptive = self._adaptive or stats.moment_ratio is not None
        rate = max(stats.learning_rates, default=0.0)
        self._rates += rate
        for name, norm in zip(stats.names, stats.grad_norms, strict=True):
            self._pulls[name] = self._pulls.get(name, 0.0) + rate * norm

    def _learn(self, stats: StepStats, moves: WeightMoves) -> None:
        rates, pulls = self._rates, [self._pulls.get(name, 0.0) for name, _ in stats.weight_norms]
        for measure, (befores, nows, _, _) in _columns(stats, moves):
            reach = self._reach.setdefault(measure, {})
            rows = zip(stats.weight_norms, befores, nows, pulls, strict=True)
            for (name, _), before, now, pull in rows:
                size = abs(now - before)
                if not 0 < size < math.inf:
                    continue
                known = reach.setdefault(name, [0, 0.0, 0.0])
                known[0] += 1
                known[1] = max(size / rates, 0.9 * known[1])
                known[2] = max(size / pull if pull > 0 else 0.0, 0.9 * known[2])

    def state_dict(self) -> dict[str, Any]:
        """Returns the past changes; without the reported ones, so that no restore undoes them."""
        return {
            "reach": {m: {n: list(r) for n, r in by.items()} for m, by in self._reach.items()},
            "rates": self._rates,
            "adaptive": self._adaptive,
            "pulls": dict(self._pulls),
            "accepted": sorted(self._accepted),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._reach = {
            measure: {name: [int(n), float(a), float(b)] for name, (n, a, b) in by_name.items()}
            for measure, by_name in state["reach"].items()
        }
        self._rates, self._pulls = float(state["rates"]), dict(state["pulls"])
        self._accepted |= set(state.get("accepted", ()))
        self._adaptive = bool(state["adaptive"])


def _columns(stats: StepStats, moves: WeightMoves) -> Iterator[tuple[_Measure, _Columns]]:
    """Yields, for each measure, the fields of `_Change` except the names, of all weights."""
    norms = [norm for _, norm in stats.weight_norms]
    yield "norm", (moves.norms, norms, moves.distances, moves.norms)
    peaks, now = [peak for peak, _ in moves.peaks], [peak for _, peak in moves.peaks]
    first, second = [far for far, _ in moves.farthest], [far for _, far in moves.farthest]
    yield "largest element", (peaks, now, second, peaks)
    yield "single element", ([0.0] * len(first), first, second, peaks)
