"""A copy of a checkpoint in host memory, so that it can be written in the background.

May import torch, but not Lightning.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local, shard_on_host
from lit_stability.measurement.number_formats import is_measurable
from lit_stability.training_state.copies import Copies, HostCopies, Pairs, version_of

_Path = tuple[Any, ...]
_Groups = dict[Any, tuple[list[Tensor], list[Tensor]]]


class HostCopy:
    """Copies nested dicts and lists of tensors into buffers that are reused by each capture.

    Tensors that share memory in the original share it in the copy. Of a sharded tensor this rank's
    shard is copied. Everything that is not a tensor is deep-copied.

    Args:
        copies: how tensors are copied, and which memory the buffers are in.

    >>> held, weight = HostCopy(), torch.ones(2)
    >>> held.capture({"weight": weight}); held.finish()
    >>> weight.zero_(), held.state
    (tensor([0., 0.]), {'weight': tensor([1., 1.])})
    """

    def __init__(self, copies: Copies | None = None) -> None:
        self.state: dict[str, Any] = {}
        """The copy; to be read after `finish`, and valid until the next `capture`."""
        self._copies = copies or HostCopies()
        self._buffers: dict[_Path, Tensor] = {}
        self._sources: list[tuple[Tensor, int]] = []

    @torch.no_grad()
    def capture(self, checkpoint: Mapping[str, Any], steady: Iterable[Tensor] = ()) -> None:
        """Copies a checkpoint into the buffers.

        Args:
            checkpoint: nested dicts and lists.
            steady: tensors that nobody writes for now: their copies may be made later. The others
                are copied before the device does anything else.
        """
        before, self._buffers = self._buffers, {}
        later = {_memory(t) for t in map(local, steady) if _is_plain(t)}
        shared: dict[Any, Tensor] = {}
        memo: dict[int, Any] = {}
        at_once: _Groups = {}
        beside: _Groups = {}
        for path, whole in _tensors(checkpoint):
            tensor = local(whole)
            if not _is_plain(tensor):
                memo[id(whole)] = whole.detach().cpu().clone()
                continue
            key = _memory(tensor)
            if key not in shared:
                shared[key] = self._buffers[path] = self._buffer(before.get(path), tensor)
                _add(beside if key in later else at_once, shared[key], tensor.detach())
            memo[id(whole)] = shard_on_host(shared[key], whole)
        self.state = copy.deepcopy(dict(checkpoint), memo)
        self._copies.start([*at_once.values()])
        self._copies.wait()
        self._start_beside([*beside.values()])

    def _start_beside(self, pairs: Pairs) -> None:
        self._sources = [(t, version_of(t)) for _, sources in pairs for t in sources]
        self._copies.start(pairs)

    def finish(self) -> None:
        """Waits until the copy is complete."""
        self._copies.finish()

    @property
    def written(self) -> bool:
        """Whether a tensor of which the copy may be made later was written since the capture."""
        return any(version_of(t) != version for t, version in self._sources)

    def _buffer(self, before: Tensor | None, tensor: Tensor) -> Tensor:
        alike = before is not None and before.shape == tensor.shape and before.dtype == tensor.dtype
        return before if alike and before is not None else self._copies.buffer(tensor)

    @property
    def nbytes(self) -> int:
        """Returns the size of the buffers in bytes."""
        return sum(t.numel() * t.element_size() for t in self._buffers.values())


def first_nonfinite(state: Mapping[str, Any], exempt: Collection[str] = ()) -> str | None:
    """Returns the name of the first weight, buffer or optimizer tensor with a NaN or Inf, or None.

    Args:
        state: a checkpoint in Lightning's format.
        exempt: names of buffers that are non-finite on purpose, such as a mask of -inf.

    >>> first_nonfinite({"state_dict": {"w": torch.tensor([1.0, float("nan")])}})
    'w'
    >>> mask = {"state_dict": {"mask": torch.tensor([0.0, -float("inf")])}}
    >>> first_nonfinite(mask, exempt=["mask"]) is None
    True
    """
    for name, value in state.get("state_dict", {}).items():
        if name not in exempt and isinstance(value, Tensor) and not is_finite(value):
            return str(name)
    for path, tensor in _tensors(state.get("optimizer_states", [])):
        if not is_finite(tensor):
            return "optimizer " + ".".join(map(str, path))
    return None


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all elements are finite, in one pass and without a temporary tensor."""
    tensor = local(tensor)
    if not is_measurable(tensor) or tensor.numel() == 0:
        return True
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _tensors(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, index))


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor has its elements in memory of its own, and no behaviour."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _add(groups: _Groups, target: Tensor, source: Tensor) -> None:
    targets, sources = groups.setdefault((source.dtype, source.device), ([], []))
    targets.append(target)
    sources.append(source)


def _memory(tensor: Tensor) -> Any:
    """Returns a key that is equal for two tensors that view the same memory in the same way."""
    if tensor.numel() == 0:
        return id(tensor)
    place = (tensor.data_ptr(), tensor.device, tensor.dtype)
    return (*place, tuple(tensor.shape), tensor.stride())
