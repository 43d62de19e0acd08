"""Has optimizers' steps come after copies of what they write, which are made beside training.

May import torch, but not Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_stability.training_state.copies import Copies


class StepBarrier:
    """Keeps the copy in flight whole: the next optimizer's step comes after it.

    Weights and moments change in optimizers' steps. In automatic optimization without a loss scaler
    Lightning hands forward and backward pass to such a step as its closure, so that they come after
    the copy too: the host goes on, and the device waits for the copy. That is on purpose. A
    ``training_step`` may write weights for a moment by way of ``p.data``, as adversarial training
    does, and no version counter would show it.

    A tensor that the program itself writes before the step may be torn in the copy, which is then
    discarded. From then on the device waits for each copy at once: a program that has written once
    may do so again, and nothing else would be copied.

    Copies that are immediate are never torn, and are not waited for.

    Args:
        copies: make the copy.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)
    >>> barrier = StepBarrier(Copies())
    >>> barrier.follow([optimizer])
    >>> barrier.begin(written=lambda: False, discard=lambda: None)
    >>> optimizer.step(); barrier.close()
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._in_flight: tuple[Callable[[], bool], Callable[[], None]] | None = None
        self._has_torn = False
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Has the steps of these optimizers come after the copies."""
        found = list(optimizers)
        if found != self._optimizers:
            self._remove_hooks()
            self._optimizers = found
            self._handles = [o.register_step_pre_hook(self._before_step) for o in found]

    def begin(self, *, written: Callable[[], bool], discard: Callable[[], None]) -> None:
        """Records that a copy has begun.

        Args:
            written: returns whether a source was written since the copy began.
            discard: called if the copy may be torn.
        """
        self._in_flight = None if self._copies.immediate else (written, discard)
        if self._has_torn:
            self.wait()

    def wait(self) -> None:
        """Has what the caller does next come after the copy; discards one that may be torn."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return
        self._copies.wait()
        written, discard = in_flight
        if written():
            self._has_torn = True
            discard()

    def finish(self) -> None:
        """Has the host wait until the copy is complete; discards one that may be torn."""
        self.wait()
        self._copies.finish()

    def close(self) -> None:
        """Waits for the copy, and removes the hooks of the optimizers."""
        self._in_flight = None
        self._copies.finish()
        self._remove_hooks()

    def _before_step(self, *_: Any) -> None:
        self.wait()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
