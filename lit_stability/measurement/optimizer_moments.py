"""Checks samples of the optimizer's moments: finite, and within the bounds of their recursion.

May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.measurement.norms import non_finite
from lit_stability.measurement.weight_sampling import RECHECK, WeightSampler

_Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_BLOCKS = 2
"""Sampled blocks per moment; few, because relevant damage affects the whole tensor."""
_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "square_avg", "sum")
"""Keys of moments in the state of an optimizer: of Adam and its kin, of RMSprop and Adadelta, and
of Adagrad."""
_KEYS = (*_FIRST, *_SECOND)


@dataclass(frozen=True, slots=True)
class MomentStats:
    """The state of the moments, judged by the sample."""

    bad_momentum: tuple[str, ...] = ()
    """Parameters whose momentum or first moment is non-finite."""
    ratio: float | None = None
    """Smallest ratio, over parameters, of the second moment to what decay alone would leave."""
    name: str = ""
    """The parameter with that ratio."""
    growth: float | None = None
    """Largest ratio of the second moment to what decay and the last gradient add up to at most."""
    growth_name: str = ""
    """The parameter with that ratio."""


class OptimizerMoments:
    """Compares sampled sums of each parameter's momentum and second moment between steps.

    Args:
        names: of the parameters.
        parameters: the parameters whose state is read.
        optimizer: the optimizer that holds the state.
    """

    def __init__(
        self, names: Sequence[str], parameters: Sequence[Tensor], optimizer: Optimizer
    ) -> None:
        self._names, self._parameters, self._optimizer = names, parameters, optimizer
        self._samples: WeightSampler | None = None
        self._known: list[Tensor | None] = []
        self._calls = 0
        self._first: list[str] = []
        self._second: list[str] = []
        self._first_at = self._second_at = np.empty(0, dtype=int)
        """Positions of the first moments among the sums, in the order of ``_first``."""
        self._decay: _Numbers = np.empty(0)
        self._gain: _Numbers = np.empty(0)
        """By what a square is multiplied that is added to a second moment."""
        self.decays: dict[str, float] = {}
        """Decay of the second moment of Adam, by parameter; only of parameters that have one."""
        self._last: _Numbers | None = None
        self._last_sums: Tensor | None = None
        self._decays_on_device: Tensor | None = None
        self._gains_on_device: Tensor | None = None
        self._first_names: Tensor | None = None
        self._second_names: Tensor | None = None
        """Place among the names of each parameter with a moment; None if all have one."""
        self._gradients: Mapping[str, float] = {}
        """Norm of the last gradients, by parameter."""
        self._gradients_on_device: Tensor | None = None

    def gradients(self, names: Sequence[str], norms: Sequence[float]) -> None:
        """Remembers the gradient norms of this step, which bound the moments of the next."""
        self._gradients = dict(zip(names, norms, strict=True))

    def gradients_on_device(self, norms: Tensor | None) -> None:
        """Remembers the norms of all parameters' gradients for `row`; None if some are missing."""
        self._gradients_on_device = norms

    def forget(self) -> None:
        """Clears the sums of the last step; the next call looks for the moments again."""
        self._last = self._last_sums = None
        self._gradients, self._gradients_on_device = {}, None
        self._calls = 0

    def sums(self) -> list[Tensor]:
        """Returns the sums of all moments in one tensor, for `judge`; [] without moments."""
        if self._samples is None or self._calls % RECHECK == 0:
            self._find()
        self._calls += 1
        return [] if self._samples is None else [self._samples.sums(self._samples.gather())]

    def _find(self) -> None:
        """Finds the moments; an optimizer creates them at its first step, and may replace them."""
        found = [state.get(key) for state in self._optimizer.state.values() for key in _KEYS]
        if len(found) == len(self._known) and all(map(is_, found, self._known)):
            return
        self._known = found
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        kinds: dict[str, str] = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            state = self._optimizer.state.get(parameter) or {}
            momentum = next((state[key] for key in _FIRST if state.get(key) is not None), None)
            # The momentum of sparse gradients may be sparse, without memory to sample from.
            if momentum is not None and momentum.layout is torch.strided:
                first[name] = momentum
            kind = next((key for key in _SECOND if isinstance(state.get(key), Tensor)), None)
            if kind is not None and state[kind].layout is torch.strided:
                second[name], kinds[name] = state[kind], kind
        tensors = [*first.values(), *second.values()]
        self._samples = WeightSampler(tensors, _BLOCKS) if tensors else None
        self._first, self._second = list(first), list(second)
        positions = np.array([] if self._samples is None else self._samples.positions, dtype=int)
        self._first_at, self._second_at = positions[: len(first)], positions[len(first) :]
        rates = self._rates(kinds)
        self.decays = {n: rates[n][0] for n, kind in kinds.items() if kind == "exp_avg_sq"}
        self._decay = np.array([rates[name][0] for name in second])
        self._gain = np.array([rates[name][1] for name in second])
        self._decays_on_device = self._first_names = None
        self._last = self._last_sums = None

    def judge(self, sums: Sequence[float]) -> MomentStats:
        """Compares the sums, copied to the host, with those of the step before."""
        numbers = np.asarray(sums)
        second = numbers[self._second_at]
        bad = non_finite(self._first, numbers[self._first_at].tolist())
        last, self._last = self._last, second if len(second) else None
        if last is None or len(last) != len(second):
            return MomentStats(bad)
        with np.errstate(all="ignore"):
            # v_t = b v_(t-1) + c g^2 >= b v_(t-1): c is 1 - b (Kingma & Ba 2015, Algorithm 1), or
            # b = c = 1 (Duchi et al. 2011).
            floors = self._decay * last
            ratios = second / floors
            ratios[~np.isfinite(second)] = math.nan
            ratios[~(floors > 0)] = math.inf
            grown = self._largest_growth(second, floors)
        worst = int(ratios.argmin())  # the first NaN, if there is one
        # Without any gradient so far, no second moment could fall.
        if ratios[worst] == math.inf:
            return MomentStats(bad)
        return MomentStats(bad, float(ratios[worst]), self._second[worst], *grown)

    def _largest_growth(self, second: _Numbers, floors: _Numbers) -> tuple[float | None, str]:
        """Returns the largest ratio to the upper bound, with its parameter."""
        # The sample of a tensor has no larger sum of squares than the whole.
        norms = np.array([self._gradients.get(name, math.nan) for name in self._second])
        bounds = floors + self._gain * norms * norms
        ratios = second / bounds
        ratios[~((bounds > 0) & (bounds < math.inf))] = -1.0
        most = int(ratios.argmax())
        return (float(ratios[most]), self._second[most]) if ratios[most] >= 0 else (None, "")

    def row(self, device: torch.device) -> Tensor:
        """Returns this rank's verdict on the device, a row of shape ``(5,)`` for `judge_rows`."""
        found = self.sums()
        row = torch.zeros(5, dtype=torch.float64, device=device)
        row[0], row[1] = -1.0, math.inf
        if not found:
            return row
        assert self._samples is not None
        sums = found[0][self._samples.positions_on_device]
        momentum, second = sums[: len(self._first)], sums[len(self._first) :]
        if self._first_names is None and len(momentum) != len(self._names):
            self._first_names = self._indices(self._first, device)
        if len(momentum):
            bad = ~torch.isfinite(momentum)
            place = bad.int().argmax()
            if self._first_names is not None:
                place = self._first_names[place]
            row[0] = torch.where(bad.any(), place, -1)
        last, self._last_sums = self._last_sums, second
        if last is not None and len(second):
            if self._decays_on_device is None:
                self._decays_on_device = last.new_tensor(self._decay.tolist())
                self._gains_on_device = last.new_tensor(self._gain.tolist())
                self._second_names = self._indices(self._second, device)
            floor = last * self._decays_on_device
            ratio = torch.where(torch.isfinite(second), second / floor, math.nan)
            # A parameter without gradients so far, or an empty shard, cannot fall.
            row[1], least = torch.where(floor > 0, ratio, math.inf).min(dim=0)
            row[2] = least if self._second_names is None else self._second_names[least]
            gradients = self._gradients_on_device
            gains = self._gains_on_device
            if gradients is not None and self._second_names is None and gains is not None:
                added = gains * gradients.to(floor).square()
                growth = torch.where(floor + added > 0, second / (floor + added), 0.0)
                row[3], row[4] = growth.nan_to_num(0.0).max(dim=0)
        return row

    def judge_rows(self, rows: Sequence[Sequence[float]]) -> MomentStats:
        """Returns the worst verdict of all ranks, the same on every rank.

        Args:
            rows: for each rank the index of the first parameter with a non-finite momentum, or -1;
                the smallest ratio, or Inf, and the index of its parameter; the largest growth, or
                0, and the index of its parameter. Indices into the names of all parameters.
        """
        bad = {int(row[0]) for row in rows if row[0] >= 0}
        names = tuple(self._names[i] for i in sorted(bad))
        worst = min(rows, key=lambda row: -1.0 if math.isnan(row[1]) else row[1])
        if worst[1] == math.inf:
            return MomentStats(names)
        most = max(rows, key=lambda row: row[3])
        growth = (most[3], self._names[int(most[4])]) if most[3] > 0 else (None, "")
        return MomentStats(names, worst[1], self._names[int(worst[2])], *growth)

    def _indices(self, names: list[str], device: torch.device) -> Tensor | None:
        if names == list(self._names):
            return None
        places = {name: i for i, name in enumerate(self._names)}
        return torch.tensor([places[name] for name in names], device=device)

    def _rates(self, kinds: Mapping[str, str]) -> dict[str, tuple[float, float]]:
        """Returns decay and gain of the second moment of each parameter that has one."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        pairs = zip(self._names, self._parameters, strict=True)
        return {n: _rates_of(kinds[n], groups[id(p)]) for n, p in pairs if n in kinds}


def _rates_of(kind: str, group: Mapping[str, Any]) -> tuple[float, float]:
    """Returns decay and gain of a second moment; if they are not known, any change is possible.

    >>> _rates_of("exp_avg_sq", {"betas": (0.9, 0.75)}), _rates_of("square_avg", {"alpha": 0.5})
    ((0.75, 0.25), (0.5, 0.5))
    >>> _rates_of("sum", {"lr_decay": 0.0}), _rates_of("exp_avg_sq", {"decay_rate": -0.8})
    ((1.0, 1.0), (0.0, inf))
    """
    if kind == "sum" and "lr_decay" in group:
        return 1.0, 1.0
    decay = None
    if kind == "square_avg":
        decay = group.get("alpha", group.get("rho"))
    elif kind == "exp_avg_sq" and "betas" in group:
        decay = group["betas"][1]
    return (0.0, math.inf) if decay is None else (float(decay), 1.0 - float(decay))
