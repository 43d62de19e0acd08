"""The optimizer's moments, watched by a sample: finite, and falling no faster than they can.

May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lit_stability.sampling import Samples

_FIRST = ("exp_avg", "momentum_buffer")
"""Where torch's optimizers keep what moves the weights most."""


class Moments:
    """Sampled sums of momentum and second moment, one per parameter that has one.

    Args:
        names: of the parameters.
        parameters: whose state to read.
        optimizer: that holds the state.
    """

    def __init__(
        self, names: Sequence[str], parameters: Sequence[Tensor], optimizer: Optimizer
    ) -> None:
        self._names, self._parameters, self._optimizer = names, parameters, optimizer
        self._first: Samples | None = None
        self._second: Samples | None = None
        self.first_names: list[str] = []
        """The parameters that have a momentum or a first moment, in the order of `first`."""
        self._second_names: list[str] = []
        self._decay: list[float] = []
        self._last: list[float] | None = None

    def forget(self) -> None:
        """Drop what was remembered of the last step."""
        self._last = None

    def first(self) -> list[Tensor]:
        """Sums of the momentum, a tensor of shape ``(parameters that have one,)`` or nothing."""
        names, tensors = self._find(_FIRST)
        if not tensors:
            return []
        if self._first is None or self._first.count != len(tensors):
            self._first, self.first_names = Samples(tensors), names
        return [self._first.sums(self._first.gather(tensors))]

    def second(self) -> list[Tensor]:
        """Sums of Adam's second moment, likewise."""
        names, tensors = self._find(("exp_avg_sq",))
        if not tensors:
            return []
        if self._second is None or self._second.count != len(tensors):
            self._second, self._second_names = Samples(tensors), names
            decay = self._decays()
            self._decay = [decay[name] for name in names]
        return [self._second.sums(self._second.gather(tensors))]

    def ratio(self, sums: Sequence[float]) -> tuple[float | None, str]:
        """Smallest ratio of a second moment to what its decay alone leaves, and whose it is.

        Args:
            sums: what `second` gave, on the host.
        """
        last, self._last = self._last, list(sums) or None
        if not sums or last is None or len(last) != len(sums):
            return None, ""
        # v_t = b v_(t-1) + (1 - b) g^2 >= b v_(t-1) (Kingma & Ba 2015, Algorithm 1).
        rows = zip(self._second_names, sums, last, self._decay, strict=True)
        ratios = [
            (now / (b * before) if math.isfinite(now) else math.nan, name)
            for name, now, before, b in rows
            if before > 0 and b > 0
        ]
        worst = min(ratios, key=lambda pair: -1.0 if math.isnan(pair[0]) else pair[0], default=None)
        return worst or (None, "")

    def _find(self, keys: Sequence[str]) -> tuple[list[str], list[Tensor]]:
        found = [
            (name, state[key])
            for name, p in zip(self._names, self._parameters, strict=True)
            if (state := self._optimizer.state.get(p))
            and (key := next((k for k in keys if state.get(k) is not None), None))
        ]
        return [n for n, _ in found], [t for _, t in found]

    def _decays(self) -> dict[str, float]:
        by_id = {
            id(p): float(group["betas"][1]) if "betas" in group else 0.0
            for group in self._optimizer.param_groups
            for p in group["params"]
        }
        return {n: by_id[id(p)] for n, p in zip(self._names, self._parameters, strict=True)}
