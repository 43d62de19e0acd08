"""A copy of a checkpoint in host memory, so that it can be written in the background.

May import torch, but not Lightning.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.measurement.number_formats import is_measurable

_Path = tuple[Any, ...]


class HostCopy:
    """Copies nested dicts and lists of tensors into buffers that are reused by each capture.

    Tensors that share memory in the original share it in the copy. Everything that is not a tensor
    is deep-copied.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        """The copy; valid until the next `capture`."""
        self._buffers: dict[_Path, Tensor] = {}

    @torch.no_grad()
    def capture(self, checkpoint: Mapping[str, Any]) -> None:
        """Copies a checkpoint into the buffers."""
        before, self._buffers = self._buffers, {}
        shared: dict[Any, Tensor] = {}
        memo: dict[int, Any] = {}
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for path, tensor in _tensors(checkpoint):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                memo[id(tensor)] = tensor.detach().cpu().clone()
                continue
            key = _memory(tensor)
            if key not in shared:
                shared[key] = self._buffers[path] = _buffer(before.get(path), tensor)
                into, out_of = groups.setdefault((tensor.dtype, tensor.device), ([], []))
                into.append(shared[key])
                out_of.append(tensor.detach())
            memo[id(tensor)] = shared[key]
        for into, out_of in groups.values():
            torch._foreach_copy_(into, out_of)
        self.state = copy.deepcopy(dict(checkpoint), memo)

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


def _memory(tensor: Tensor) -> Any:
    """Returns a key that is equal for two tensors that view the same memory in the same way."""
    if tensor.numel() == 0:
        return id(tensor)
    place = (tensor.data_ptr(), tensor.device, tensor.dtype)
    return (*place, tuple(tensor.shape), tensor.stride())


def _buffer(before: Tensor | None, tensor: Tensor) -> Tensor:
    alike = before is not None and before.shape == tensor.shape and before.dtype == tensor.dtype
    return before if alike and before is not None else torch.empty_like(tensor, device="cpu")
