"""Finds the parameters that a program writes in other places than an optimizer's step.

An average of another network, a codebook, a projection: such a write is done when a bad batch is
found, and skipping the optimizer's step does not undo it. May import torch, but not Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_stability.training_state.frozen_weights import sampled
from lit_stability.training_state.tensor_parts import has_usual_memory


class WeightWrites:
    """Compares the parameters before and after the parts of a step that should not change them.

    A write is found by the parameter's version counter. ``p.data.mul_(...)`` does not raise it, so
    256 elements are compared too, in steps for which `begin` is asked to.

    Args:
        module: whose parameters are watched; sharded ones are left out.
        optimizers: their steps are no such writes.
        skips: whether an optimizer's present step is skipped, so that it should write nothing.

    >>> module = nn.Linear(2, 2)
    >>> writes = WeightWrites(module, [torch.optim.SGD([module.weight], 0.1)])
    >>> writes.begin(); writes.check()
    False
    >>> with torch.no_grad(): _ = module.bias.add_(1)
    >>> writes.check(), [p is module.bias for p in writes.written]
    (True, [True])
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Iterable[Optimizer],
        skips: Callable[[Optimizer], bool] = lambda _: False,
    ) -> None:
        self._module, self._skips = module, skips
        self.written: list[Tensor] = []
        """The parameters that were ever found written."""
        self._known: set[int] = set()
        self._watched: list[Tensor] = []
        self._versions: list[int] = []
        self._samples: dict[int, Tensor] = {}
        self._stepped_by: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        """The watched parameters of each optimizer, with their places."""
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self.follow(optimizers)

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Watches the steps of other optimizers, if the program has replaced them."""
        found = list(optimizers)
        if found == self._optimizers:
            return
        self.close()
        self._optimizers = found
        # The parameters may be others too, and one that the module no longer has may be an alias.
        self._watched = []
        self._handles = [o.register_step_post_hook(self._stepped) for o in found]
        self.begin()

    def begin(self, *, samples: bool = False) -> None:
        """Records the present weights, at the start of a step.

        Args:
            samples: whether to record elements too; costs one copy to the host in `check`.
        """
        if samples or not self._watched:
            plain = (p for p in self._module.parameters() if type(p) is nn.Parameter)
            found = [p for p in plain if has_usual_memory(p)]
            self._watched = [p for p in found if id(p) not in self._known and not p.is_inference()]
            self._stepped_by = {}
        self._versions = [p._version for p in self._watched]
        self._samples = {id(p): sampled(p).clone() for p in self._watched} if samples else {}

    def check(self) -> bool:
        """Returns whether parameters were written that were not known to be."""
        versions = [p._version for p in self._watched]
        if versions == self._versions and not self._samples:
            return False
        pairs = zip(self._watched, self._versions, strict=True)
        new = [p for p, version in pairs if p._version != version]
        self._versions = versions
        new += self._differ()
        new = [p for p in new if id(p) not in self._known]
        self._known.update(map(id, new))
        self.written += dict.fromkeys(new)
        return bool(new)

    def _differ(self) -> list[Tensor]:
        """Returns the parameters of which a sampled element has changed."""
        pairs = [
            (p, sampled(p), self._samples[id(p)]) for p in self._watched if id(p) in self._samples
        ]
        kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for pair in pairs:
            kinds.setdefault((pair[1].dtype, pair[1].device), []).append(pair)
        found = []
        for group in kinds.values():
            if not _equal([now for _, now, _ in group], [then for _, _, then in group]):
                found += [p for p, now, then in group if not _equal([now], [then])]
        return found

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if self._skips(optimizer):
            return
        for place, p in self._places(optimizer):
            if p.grad is not None:
                self._versions[place] = p._version
                if self._samples:
                    self._samples.pop(id(p), None)

    def _places(self, optimizer: Optimizer) -> list[tuple[int, Tensor]]:
        # Groups may be added in a fit.
        key = id(optimizer), sum(len(group["params"]) for group in optimizer.param_groups)
        if key not in self._stepped_by:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._stepped_by[key] = [(i, p) for i, p in enumerate(self._watched) if id(p) in held]
        return self._stepped_by[key]

    def close(self) -> None:
        """Removes the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _equal(now: list[Tensor], then: list[Tensor]) -> bool:
    """Returns whether all elements are the same bits, so that NaN equals NaN."""
    a, b = torch.cat(now), torch.cat(then)
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
