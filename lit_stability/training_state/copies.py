"""Copies tensors while training goes on, and says until when they must not change.

May import torch, but not Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Pairs: TypeAlias = Sequence[tuple[list[Tensor], list[Tensor]]]
"""Groups of targets and of sources, one foreach copy each."""


class Copies:
    """Copies at once, in the order of the device's other work.

    The base class of copies that take their time. A source must not be written between `start`
    and `wait`, and a target must not be read before `finish`.

    Attributes:
        immediate: whether a copy is complete when `start` returns, for all that comes after it.

    >>> copies, source = Copies(), torch.ones(2)
    >>> target = copies.buffer(source)
    >>> copies.start([([target], [source])]); copies.finish()
    >>> target.tolist()
    [1.0, 1.0]
    """

    immediate = True

    def buffer(self, tensor: Tensor) -> Tensor:
        """Returns memory for a copy of a tensor."""
        return torch.empty_like(tensor, requires_grad=False)

    def start(self, pairs: Pairs) -> None:
        """Begins to copy."""
        _copy(pairs)

    def wait(self) -> None:
        """Lets what the caller does next come after the copies; the host need not wait."""

    def finish(self) -> None:
        """Has the host wait until all copies are complete."""


class StreamCopies(Copies):
    """Copies from a CUDA device to pinned memory of the host, on a stream of their own.

    Args:
        device: of the tensors.
    """

    immediate = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done: Any = None

    def buffer(self, tensor: Tensor) -> Tensor:
        """Returns pinned memory for a copy of a tensor; tensors of the host keep to their own."""
        on_device = tensor.device.type == self._device.type
        return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=on_device)

    def start(self, pairs: Pairs) -> None:
        """Begins to copy after all work that is queued now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _copy(pairs, non_blocking=True)
            for _, sources in pairs:
                for source in sources:  # one that is replaced meanwhile keeps its memory
                    if source.device.type == self._device.type:
                        source.record_stream(self._stream)
            self._done = self._stream.record_event()

    def wait(self) -> None:
        """Lets the device's next work on the present stream come after the copies."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def finish(self) -> None:
        """Waits for the device."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None


class HostCopies(Copies):
    """Copies to the memory of the host at once, from a device without streams."""

    def buffer(self, tensor: Tensor) -> Tensor:
        """Returns memory of the host for a copy of a tensor."""
        return torch.empty_like(tensor, device="cpu", requires_grad=False)


def copies_to_host(device: torch.device) -> Copies:
    """Returns copies to the host for the tensors of a device."""
    return StreamCopies(device) if device.type == "cuda" else HostCopies()


def version_of(tensor: Tensor) -> int:
    """Returns the version counter of a tensor, which a write raises; 0 if it has none."""
    return 0 if tensor.is_inference() else tensor._version


def place_of(tensor: Tensor) -> int:
    """Returns the address of a tensor's elements; 0 if it has none, as some subclasses."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


@torch.no_grad()
def _copy(pairs: Pairs, *, non_blocking: bool = False) -> None:
    for targets, sources in pairs:
        torch._foreach_copy_(targets, sources, non_blocking=non_blocking)
