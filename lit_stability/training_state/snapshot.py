"""In-memory snapshots of modules and optimizers, captured and restored in place.

Tensors are copied to preallocated buffers, with one foreach copy per dtype and device; of a sharded
tensor, each rank copies its own shard. Everything else is deep-copied. May import torch, but not
Lightning.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.distributed.dtensor import is_wrapper, local
from lit_stability.measurement.number_formats import is_measurable, which_are_finite
from lit_stability.training_state.copies import Copies, place_of, version_of
from lit_stability.training_state.frozen_weights import FrozenWeights, Kept
from lit_stability.training_state.tensor_parts import apart, parts


class TensorBank:
    """Copies a list of tensors into buffers that are reused by each capture.

    Args:
        copies: how, and where to; None for a copy at once on the tensors' own devices.
    """

    def __init__(self, copies: Copies | None = None) -> None:
        self._copies = copies or Copies()
        self._live: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._devices: list[torch.device] = []
        self._pairs: _Pairs = []
        self._versions: list[int] = []
        self._places: list[int] = []

    def place(self, copies: Copies) -> None:
        """Has the next capture copy in another way; the buffers are made again for it."""
        if copies is not self._copies:
            self._copies, self._saved = copies, []

    @torch.no_grad()
    def capture(self, tensors: Sequence[Tensor]) -> None:
        """Copies the tensors; allocates new buffers only if a shape, dtype or device changed."""
        live = [local(t) for t in tensors]
        fitting = self._fit(live)
        if not fitting:
            self._saved, self._pairs = [], []
            self._saved = [self._copies.buffer(t) for t in live]
            self._devices = [t.device for t in live]
        if not fitting or not _same(self._live, live):
            self._live = live
            self._pairs = _in_groups(self._saved, live)
        self._versions = [version_of(t) for t in live]
        self._places = [] if self._copies.immediate else [place_of(t) for t in live]
        self._copies.start(self._pairs)

    def _fit(self, live: list[Tensor]) -> bool:
        """Whether the buffers were made for tensors like these."""
        if len(live) != len(self._saved) or [t.device for t in live] != self._devices:
            return False
        pairs = zip(live, self._saved, strict=True)
        return all(t.dtype == s.dtype and t.shape == s.shape for t, s in pairs)

    @property
    def written(self) -> bool:
        """Whether a captured tensor was written, or got other memory, since the capture.

        A write by way of ``data`` shows if it ends with other memory, as adversarial training does.
        """
        if self._places and self._places != [place_of(t) for t in self._live]:
            return True
        return self._versions != [version_of(t) for t in self._live]

    @torch.no_grad()
    def restore(self, targets: Sequence[Tensor] | None = None) -> None:
        """Copies the saved values into the captured tensors, or into ``targets``."""
        self._copies.finish()
        same = targets is None or _same(self._live, targets)
        pairs = self._pairs if same else _in_groups(self._saved, targets or [])
        for saved, now in pairs:
            torch._foreach_copy_(now, saved)

    @property
    def saved(self) -> list[Tensor]:
        """Returns the copies, in the order of the captured tensors."""
        self._copies.finish()
        return self._saved

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs ``(live, saved)`` of captured tensors and copies."""
        self._copies.finish()
        return [(t.detach(), s) for t, s in zip(self._live, self._saved, strict=True)]

    @property
    def nbytes(self) -> int:
        """Returns the size of the buffers in bytes."""
        return sum(t.numel() * t.element_size() for t in self._saved)


class ModuleSnapshot:
    """Snapshot of a module's parameters and buffers, including non-persistent buffers.

    Args:
        frozen: holds one copy of the frozen parameters for all snapshots that share it.
        copies: how the parameters are copied, and where to.
    """

    def __init__(self, frozen: FrozenWeights | None = None, copies: Copies | None = None) -> None:
        self.bank = TensorBank(copies)
        """Of the parameters that only optimizers change."""
        self._at_once = TensorBank()
        """Of the rest, which a forward pass may change."""
        self._wrapped = TensorBank()
        """Of what wrappers hold, such as trained weights in a format of a library."""
        self._frozen = frozen or FrozenWeights()
        self._kept: list[Kept] = []
        self._module: nn.Module | None = None
        self._parameters: list[Tensor] = []
        self._written: list[Tensor] = []
        self._homes: _Homes = []
        self._layout: list[tuple[nn.Module, str]] = []
        """Module and name of each parameter and buffer."""

    def capture(
        self,
        module: nn.Module,
        written: Collection[Tensor] = (),
        leave: Collection[int] = (),
    ) -> None:
        """Copies the module's parameters and buffers.

        Args:
            module: to copy. Frozen weights in the format of a library are not copied.
            written: parameters that the program writes at any time: they are copied at once.
            leave: ids of parameters that are not copied.
        """
        self._module = module
        modules = list(module.modules())
        self._layout = [(m, key) for m in modules for key in (*m._parameters, *m._buffers)]
        own = (p for m in modules for p in m._parameters.values() if p is not None)
        held = (p for p in dict.fromkeys(own) if id(p) not in leave)
        found, wrapped = apart(p for p in held if not _is_frozen_wrapper(p))
        changing, self._kept = self._frozen.split(found)
        at_once = {id(p) for p in written}
        self._parameters = [p for p in changing if id(p) not in at_once]
        self._written = [p for p in changing if id(p) in at_once]
        self._homes = _buffers((m, m._buffers) for m in modules)
        buffers, more = apart(b for _, _, b in self._homes if b is not None)
        self._at_once.capture([*self._written, *buffers])
        self._wrapped.capture([*wrapped, *more])
        self.bank.capture(self._parameters)

    def restore(self) -> None:
        """Restores all values; a buffer replaced by another tensor is reassigned first."""
        _reassign(self._homes)
        self.bank.restore()
        self._at_once.restore()
        self._wrapped.restore()
        for frozen in self._kept:
            frozen.restore()

    def has_same_layout(self, other: ModuleSnapshot) -> bool:
        """Returns whether another snapshot has parameters and buffers of the same names."""
        return self._layout == other._layout

    @property
    def nbytes(self) -> int:
        """Returns the size of the copies in bytes, without the frozen weights."""
        return self.bank.nbytes + self._at_once.nbytes + self._wrapped.nbytes

    def non_finite_buffers(self) -> set[tuple[int, str]]:
        """Returns id of the module and key of each buffer that was non-finite when captured."""
        return _non_finite(self._homes, self._at_once.saved[len(self._written) :])

    def drift(self) -> dict[str, float]:
        """Returns the largest absolute change of any element since the capture, by parameter."""
        if self._module is None:
            return {}
        names = {id(p): name for name, p in self._module.named_parameters()}
        pairs = [
            *zip(self._parameters, self.bank.pairs, strict=True),
            *zip(self._written, self._at_once.pairs, strict=False),
            *((frozen.parameter, (frozen.live.detach(), frozen.saved)) for frozen in self._kept),
        ]
        return {
            names[id(p)]: float((live - saved.to(live.device)).abs().amax())
            if live.numel()
            else 0.0
            for p, (live, saved) in pairs
            if id(p) in names and is_measurable(live)
        }

    def outlier(self, factor: float = 1e3) -> tuple[str, float] | None:
        """Returns the parameter that changed ``factor`` times more than any other, or None.

        Training changes all parameters within a few orders of magnitude; a flipped exponent bit
        exceeds that.

        Returns:
            The parameter's name and the largest absolute change of its elements.
        """
        changes = sorted(self.drift().items(), key=lambda pair: -pair[1])
        if len(changes) < 2 or changes[1][1] == 0 or not changes[0][1] > factor * changes[1][1]:
            return None
        return changes[0]


class OptimizerSnapshot:
    """Snapshot of an optimizer's moments, step counts and group options.

    A restore deletes state that the optimizer created after the capture.

    Args:
        copies: how the tensors are copied, and where to.
    """

    def __init__(self, copies: Copies | None = None) -> None:
        self.bank = TensorBank(copies)
        self._wrapped = TensorBank()
        """Of what wrappers hold, such as moments in eight bits."""
        self._wrappers: list[tuple[Tensor, str, Tensor]] = []
        self._keys: list[tuple[Tensor, str, Tensor]] = []
        self._other: list[tuple[Tensor, str, Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._members: list[list[Tensor]] = []
        self._with_state: list[Tensor] = []
        """Parameters that have a state, which may be empty."""

    def capture(self, optimizer: Optimizer) -> None:
        """Copies the optimizer's state and group options."""
        self._with_state = [*optimizer.state]
        self._keys, self._other, self._wrappers = [], [], []
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and is_wrapper(value):
                    self._wrappers.append((parameter, key, value))
                elif isinstance(value, Tensor):
                    self._keys.append((parameter, key, value))
                else:
                    self._other.append((parameter, key, copy.deepcopy(value)))
        self._wrapped.capture([part for *_, value in self._wrappers for part in parts(value)])
        self.bank.capture([value for _, _, value in self._keys])
        self._groups = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self._members = [list(group["params"]) for group in optimizer.param_groups]

    @property
    def nbytes(self) -> int:
        """Returns the size of the copies in bytes."""
        return self.bank.nbytes + self._wrapped.nbytes

    def has_same_groups(self, optimizer: Optimizer) -> bool:
        """Returns whether the groups hold the same parameters as at the capture."""
        groups = [group["params"] for group in optimizer.param_groups]
        return len(groups) == len(self._members) and all(map(_same, groups, self._members))

    def restore(self, optimizer: Optimizer, *, drop_new_groups: bool = False) -> None:
        """Restores the captured state.

        Args:
            optimizer: the optimizer that was captured.
            drop_new_groups: remove parameters and groups that were added after the capture; a
                replay adds them again.
        """
        if drop_new_groups:
            del optimizer.param_groups[len(self._groups) :]
            for group, members in zip(optimizer.param_groups, self._members, strict=False):
                group["params"][:] = members
        kept: dict[Tensor, dict[str, Any]] = {parameter: {} for parameter in self._with_state}
        targets = []
        for (parameter, key, then), saved in zip(self._keys, self.bank.saved, strict=True):
            now = optimizer.state.get(parameter, {}).get(key)
            alike = isinstance(now, Tensor) and local(now).shape == saved.shape
            target = now if alike else then
            targets.append(local(target))
            kept.setdefault(parameter, {})[key] = target
        self.bank.restore(targets)
        self._wrapped.restore()
        for parameter, key, value in self._wrappers:
            kept.setdefault(parameter, {})[key] = value
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
    """Snapshot of a module's buffers, and of some parameters, at the start of a step.

    A bad batch changes them before its step is rejected. Each capture copies all of them: batch
    normalization writes its running statistics without raising their version counters, so the
    changed ones cannot be found.

    Args:
        module: the module whose buffers are guarded.
    """

    def __init__(self, module: nn.Module) -> None:
        # The dicts are stored: reaching them through many modules takes longer than the copy.
        self._owners = [(m, m._buffers) for m in module.modules()]
        self._bank = TensorBank()
        self._homes: _Homes = []
        self._buffers: list[Tensor] = []
        self._parts: list[Tensor] = []
        """Of buffers that are wrappers."""
        self._parameters: list[Tensor] = []

    def capture(self, parameters: Sequence[Tensor] = ()) -> None:
        """Copies all buffers, and the parameters that the program writes in a step."""
        before, self._homes = self._homes, _buffers(self._owners)
        if not _same([b for *_, b in before], [b for *_, b in self._homes]):
            self._buffers, self._parts = apart(b for _, _, b in self._homes if b is not None)
        self._parameters = list(parameters)
        self._bank.capture([*self._buffers, *self._parts, *parameters])

    def restore(self) -> None:
        """Restores all buffers; a buffer replaced by another tensor is reassigned first."""
        _reassign(self._homes)
        self._bank.restore()

    def non_finite_buffers(self) -> set[tuple[int, str]]:
        """Returns id of the module and key of each buffer that was non-finite when captured."""
        return _non_finite(self._homes, self._bank.saved[: len(self._buffers)])

    def had_finite(self, parameters: Iterable[Tensor]) -> bool:
        """Returns whether a finite copy was captured of each of the parameters."""
        copies = self._bank.saved[len(self._bank.saved) - len(self._parameters) :]
        known = {id(p): saved for p, saved in zip(self._parameters, copies, strict=True)}
        asked = [known.get(id(p)) for p in parameters]
        captured = [saved for saved in asked if saved is not None]
        return len(captured) == len(asked) and all(which_are_finite(captured))


_Homes: TypeAlias = list[tuple[nn.Module, str, Tensor | None]]
"""Module, key and buffer."""


def _is_frozen_wrapper(parameter: Tensor) -> bool:
    return is_wrapper(parameter) and not parameter.requires_grad


def _buffers(owners: Iterable[tuple[nn.Module, dict[str, Tensor | None]]]) -> _Homes:
    return [(m, key, b) for m, buffers in owners if buffers for key, b in buffers.items()]


def _non_finite(homes: _Homes, saved: Iterable[Tensor]) -> set[tuple[int, str]]:
    # Wrappers, and buffers without content, were not copied themselves.
    owned = [(id(module), key) for module, key, b in homes if b is not None and apart([b])[0]]
    pairs = zip(owned, which_are_finite(saved), strict=True)
    return {owner for owner, finite in pairs if not finite}


def _reassign(homes: _Homes) -> None:
    """Undoes assignments such as ``self.centre = 0.9 * self.centre + 0.1 * mean``."""
    for module, key, buffer in homes:
        if module._buffers.get(key) is not buffer:
            module._buffers[key] = buffer


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


_Pairs: TypeAlias = list[tuple[list[Tensor], list[Tensor]]]


def _in_groups(a: Iterable[Tensor], b: Iterable[Tensor]) -> _Pairs:
    """Splits both lists into groups of one dtype and two devices, for one foreach copy each."""
    groups: dict[
        tuple[torch.dtype, torch.device, torch.device], tuple[list[Tensor], list[Tensor]]
    ] = {}
    for x, y in zip(a, b, strict=True):
        xs, ys = groups.setdefault((x.dtype, x.device, y.device), ([], []))
        xs.append(x)
        ys.append(y)
    return list(groups.values())
