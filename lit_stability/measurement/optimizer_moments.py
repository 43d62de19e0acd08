"""The optimizer's moments, watched by a sample: finite, and falling no faster than they can.

May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_, mul

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.measurement.norms import non_finite
from lit_stability.measurement.weight_sampling import RECHECK, WeightSampler

_BLOCKS = 2
"""Blocks sampled of each moment: damage that matters fills a tensor."""
_KEYS = ("exp_avg", "momentum_buffer", "exp_avg_sq")
"""What optimizers call their moments."""


@dataclass(frozen=True, slots=True)
class MomentStats:
    """What the sample says of the moments."""

    bad_momentum: tuple[str, ...] = ()
    """Parameters whose momentum or first moment is non-finite."""
    ratio: float | None = None
    """Smallest ratio over parameters of the second moment to what its decay alone leaves."""
    name: str = ""
    """The parameter that has it."""


class OptimizerMoments:
    """Sampled sums of momentum and second moment of each parameter, from step to step.

    Args:
        names: of the parameters.
        parameters: whose state to read.
        optimizer: that holds the state.
    """

    def __init__(
        self, names: Sequence[str], parameters: Sequence[Tensor], optimizer: Optimizer
    ) -> None:
        self._names, self._parameters, self._optimizer = names, parameters, optimizer
        self._samples: WeightSampler | None = None
        self._seen: list[Tensor | None] = []
        self._calls = 0
        self._first: list[str] = []
        self._second: list[str] = []
        self._first_at: list[int] = []
        """Where among the sums those of the first moments are; in their order."""
        self._second_at: list[int] = []
        self._decay: list[float] = []
        self.decays: dict[str, float] = {}
        """Decay of the second moment of each parameter that has one."""
        self._last: list[float] | None = None
        self._last_sums: Tensor | None = None
        self._decays_there: Tensor | None = None

    def forget(self) -> None:
        """Drop what was remembered of the last step, and look for the moments anew."""
        self._last = self._last_sums = None
        self._calls = 0

    def sums(self) -> list[Tensor]:
        """Sums of the moments there are, one tensor for the host to `judge`, or nothing."""
        if self._samples is None or self._calls % RECHECK == 0:
            self._find()
        self._calls += 1
        return [] if self._samples is None else [self._samples.sums(self._samples.gather())]

    def _find(self) -> None:
        """Look for the moments; an optimizer makes them at its first step, and may replace them."""
        seen = [state.get(key) for state in self._optimizer.state.values() for key in _KEYS]
        if len(seen) == len(self._seen) and all(map(is_, seen, self._seen)):
            return
        self._seen = seen
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            state = self._optimizer.state.get(parameter) or {}
            momentum = state.get("exp_avg", state.get("momentum_buffer"))
            # That of sparse gradients may be sparse: it has no memory to take a sample of.
            if momentum is not None and momentum.layout is torch.strided:
                first[name] = momentum
            if "exp_avg_sq" in state:
                second[name] = state["exp_avg_sq"]
        tensors = [*first.values(), *second.values()]
        self._samples = WeightSampler(tensors, _BLOCKS) if tensors else None
        self._first, self._second = list(first), list(second)
        places = [] if self._samples is None else self._samples.places
        self._first_at, self._second_at = places[: len(first)], places[len(first) :]
        decay = self._decays()
        self._decay = [decay[name] for name in second]
        self.decays = dict(zip(self._second, self._decay, strict=True))
        self._decays_there = None
        self._last = self._last_sums = None

    def judge(self, sums: Sequence[float]) -> MomentStats:
        """What the sums, on the host, say against those of the step before."""
        second = [sums[i] for i in self._second_at]
        bad = non_finite(self._first, [sums[i] for i in self._first_at])
        last, self._last = self._last, second or None
        if last is None or len(last) != len(second):
            return MomentStats(bad)
        # v_t = b v_(t-1) + (1 - b) g^2 >= b v_(t-1) (Kingma & Ba 2015, Algorithm 1).
        floors = map(mul, self._decay, last)
        ratios = [
            (now / floor if math.isfinite(now) else math.nan) if floor > 0 else math.inf
            for now, floor in zip(second, floors, strict=True)
        ]
        worst = _smallest(ratios)
        # A parameter without gradients so far has nothing that could fall.
        if ratios[worst] == math.inf:
            return MomentStats(bad)
        return MomentStats(bad, ratios[worst], self._second[worst])

    def row(self, device: torch.device) -> Tensor:
        """The rank's own judgement, left on the device: see `judge_rows`; shape ``(3,)``."""
        found = self.sums()
        row = torch.zeros(3, dtype=torch.float64, device=device)
        row[0], row[1] = -1.0, math.inf
        if not found:
            return row
        assert self._samples is not None
        sums = found[0][self._samples.places_there]
        momentum, second = sums[: len(self._first)], sums[len(self._first) :]
        if len(momentum):
            bad = ~torch.isfinite(momentum)
            row[0] = torch.where(bad.any(), bad.int().argmax(), -1)
        last, self._last_sums = self._last_sums, second
        if last is not None and len(second):
            if self._decays_there is None:
                self._decays_there = last.new_tensor(self._decay)
            floor = last * self._decays_there
            ratio = torch.where(torch.isfinite(second), second / floor, math.nan)
            # A parameter without gradients so far, or an empty shard, has nothing that could fall.
            row[1], row[2] = torch.where(floor > 0, ratio, math.inf).min(dim=0)
        return row

    def judge_rows(self, rows: Sequence[Sequence[float]]) -> MomentStats:
        """The worst of all ranks' judgements, the same on every rank.

        Args:
            rows: of each rank the index of the first parameter with a bad momentum, or -1; the
                smallest ratio, Inf where there is none; and the index of the parameter that has it.
        """
        bad = {int(row[0]) for row in rows if row[0] >= 0}
        names = tuple(self._first[i] for i in sorted(bad))
        worst = min(rows, key=lambda row: -1.0 if math.isnan(row[1]) else row[1])
        if worst[1] == math.inf:
            return MomentStats(names)
        return MomentStats(names, worst[1], self._second[int(worst[2])])

    def _decays(self) -> dict[str, float]:
        by_id = {
            id(p): float(group["betas"][1]) if "betas" in group else 0.0
            for group in self._optimizer.param_groups
            for p in group["params"]
        }
        return {n: by_id[id(p)] for n, p in zip(self._names, self._parameters, strict=True)}


def _smallest(ratios: Sequence[float]) -> int:
    """Index of the first NaN, or of the smallest where there is none."""
    if math.isnan(sum(ratios)):
        return next(i for i, ratio in enumerate(ratios) if math.isnan(ratio))
    return ratios.index(min(ratios))
