"""A healthy state of training in memory, captured and restored in place.

Tensors go through preallocated buffers, one foreach copy per dtype and device, of a sharded tensor
the rank's own shard; everything else is deep-copied. May import torch; knows no Lightning.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.distributed.dtensor import local
from lit_stability.training_state.frozen_weights import FrozenWeights, Kept


class TensorBank:
    """Copies of a list of tensors, in buffers that are reused from capture to capture."""

    def __init__(self) -> None:
        self._live: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._pairs: _Pairs = []

    @torch.no_grad()
    def capture(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors in; buffers are new only where a shape, dtype or device changed."""
        live = [local(t) for t in tensors]
        if not _same(self._live, live) or not _alike(self._saved, live):
            if not _alike(self._saved, live):
                self._saved = [torch.empty_like(t, requires_grad=False) for t in live]
            self._live = live
            self._pairs = _in_groups(self._saved, live)
        for saved, now in self._pairs:
            torch._foreach_copy_(saved, now)

    @torch.no_grad()
    def restore(self, targets: Sequence[Tensor] | None = None) -> None:
        """Copy the saved values back into the very tensors they came from, or into others."""
        same = targets is None or _same(self._live, targets)
        pairs = self._pairs if same else _in_groups(self._saved, targets or [])
        for saved, now in pairs:
            torch._foreach_copy_(now, saved)

    @property
    def saved(self) -> list[Tensor]:
        """The copies."""
        return self._saved

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """``(live, saved)`` tensors."""
        return [(t.detach(), s) for t, s in zip(self._live, self._saved, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(t.numel() * t.element_size() for t in self._saved)


class ModuleSnapshot:
    """Parameters and buffers of a module, non-persistent buffers included.

    Args:
        frozen: keeps the parameters that do not train, once for all snapshots that share it.
    """

    def __init__(self, frozen: FrozenWeights | None = None) -> None:
        self.bank = TensorBank()
        self._frozen = frozen or FrozenWeights()
        self._kept: list[Kept] = []
        self._module: nn.Module | None = None
        self._parameters: list[Tensor] = []
        self._homes: list[tuple[nn.Module, str, Tensor | None]] = []

    def capture(self, module: nn.Module) -> None:
        """Copy them in."""
        self._module = module
        modules = list(module.modules())
        found = (p for m in modules for p in m._parameters.values() if p is not None)
        self._parameters, self._kept = self._frozen.split(dict.fromkeys(found))
        self._homes = _buffers((m, m._buffers) for m in modules)
        buffers = [b for _, _, b in self._homes if b is not None]
        self.bank.capture([*self._parameters, *buffers])

    def restore(self) -> None:
        """Copy them back; a buffer that was replaced by another tensor comes back itself."""
        _put_back(self._homes)
        self.bank.restore()
        for each in self._kept:
            each.restore()

    def drift(self) -> dict[str, float]:
        """Largest absolute change of any element since the capture, by parameter."""
        if self._module is None:
            return {}
        names = {id(p): name for name, p in self._module.named_parameters()}
        pairs = [
            *zip(self._parameters, self.bank.pairs, strict=False),
            *((each.live, (each.live.detach(), each.saved)) for each in self._kept),
        ]
        return {
            names[id(p)]: float((live - saved).abs().amax()) if live.numel() else 0.0
            for p, (live, saved) in pairs
            if id(p) in names
        }

    def outlier(self, factor: float = 1e3) -> tuple[str, float] | None:
        """The parameter of which an element moved ``factor`` times more than any other parameter's.

        Training moves all parameters within a few orders of magnitude; a flipped exponent bit does
        not keep to that. Returns its name and the largest change, or None.
        """
        moved = sorted(self.drift().items(), key=lambda pair: -pair[1])
        if len(moved) < 2 or moved[1][1] == 0 or not moved[0][1] > factor * moved[1][1]:
            return None
        return moved[0]


class OptimizerSnapshot:
    """Moments, step counts and group options of an optimizer.

    State that the optimizer created after the capture is deleted at restore.
    """

    def __init__(self) -> None:
        self.bank = TensorBank()
        self._keys: list[tuple[Tensor, str, Tensor]] = []
        self._other: list[tuple[Tensor, str, Any]] = []
        self._groups: list[dict[str, Any]] = []

    def capture(self, optimizer: Optimizer) -> None:
        """Copy it in."""
        self._keys, self._other = [], []
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self._keys.append((parameter, key, value))
                else:
                    self._other.append((parameter, key, copy.deepcopy(value)))
        self.bank.capture([value for _, _, value in self._keys])
        self._groups = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]

    def restore(self, optimizer: Optimizer, *, drop_new_groups: bool = False) -> None:
        """Copy it back.

        Args:
            optimizer: the one captured.
            drop_new_groups: remove parameter groups added since, for a replay that adds them again.
        """
        if drop_new_groups:
            del optimizer.param_groups[len(self._groups) :]
        kept: dict[Tensor, dict[str, Any]] = {}
        targets = []
        for (parameter, key, then), saved in zip(self._keys, self.bank.saved, strict=True):
            now = optimizer.state.get(parameter, {}).get(key)
            alike = isinstance(now, Tensor) and local(now).shape == saved.shape
            target = now if alike else then
            targets.append(local(target))
            kept.setdefault(parameter, {})[key] = target
        self.bank.restore(targets)
        for parameter, key, value in self._other:
            kept.setdefault(parameter, {})[key] = copy.deepcopy(value)
        for parameter in [*optimizer.state]:
            if parameter not in kept:
                del optimizer.state[parameter]
        for parameter, state in kept.items():
            live_state = optimizer.state[parameter]
            for key in [k for k in live_state if k not in state]:
                del live_state[key]
            live_state.update(state)
        for group, saved_group in zip(optimizer.param_groups, self._groups, strict=False):
            group.update(copy.deepcopy(saved_group))


class BufferGuard:
    """Buffers as they were at the start of a step: a bad batch spoils them before its veto.

    All are copied at each capture: batch normalization writes its running statistics without
    raising their version counters, so there is no telling which changed.

    Args:
        module: whose buffers to guard.
    """

    def __init__(self, module: nn.Module) -> None:
        # The mappings by themselves: to reach them through many modules takes longer than to copy.
        self._owners = [(m, m._buffers) for m in module.modules()]
        self._bank = TensorBank()
        self._homes: list[tuple[nn.Module, str, Tensor | None]] = []

    def capture(self) -> None:
        """Remember the buffers as they are."""
        self._homes = _buffers(self._owners)
        self._bank.capture([b for _, _, b in self._homes if b is not None])

    def restore(self) -> None:
        """Put them back; one that was replaced by another tensor comes back itself."""
        _put_back(self._homes)
        self._bank.restore()


def _buffers(
    owners: Iterable[tuple[nn.Module, dict[str, Tensor | None]]],
) -> list[tuple[nn.Module, str, Tensor | None]]:
    return [(m, key, b) for m, held in owners if held for key, b in held.items()]


def _put_back(homes: Iterable[tuple[nn.Module, str, Tensor | None]]) -> None:
    """Undo assignments such as ``self.centre = 0.9 * self.centre + 0.1 * mean``."""
    for module, key, buffer in homes:
        if module._buffers.get(key) is not buffer:
            module._buffers[key] = buffer


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
        for x, y in zip(a, b, strict=True)
    )


_Pairs: TypeAlias = list[tuple[list[Tensor], list[Tensor]]]


def _in_groups(a: Iterable[Tensor], b: Iterable[Tensor]) -> _Pairs:
    """Both lists in parts of one dtype and device, a foreach copy each."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for x, y in zip(a, b, strict=True):
        xs, ys = groups.setdefault((x.dtype, x.device), ([], []))
        xs.append(x)
        ys.append(y)
    return list(groups.values())
