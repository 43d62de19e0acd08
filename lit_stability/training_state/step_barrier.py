"""Has optimizers' steps come after copies of what they write, made while training goes on.

May import torch, but not Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_stability.training_state.copies import Copies


class StepBarrier:
    """Has the next optimizer's step come after the copy in flight.

    Weights and moments change in optimizers' steps. In automatic optimization Lightning hands
    forward and backward pass to such a step as its closure. The step waits before its closure, so
    that the passes come after the copy: the host goes on, but the device waits. Or it waits at the
    end of the closure, so that the passes run beside the copy.

    A tensor that the program itself writes before that may be torn in the copy. Its version counter
    shows it, if it was not written by way of ``data``. The fewer of the program's lines run beside
    the copy, the fewer such writes there are.

    Copies that are immediate are never torn, and are not waited for.

    Args:
        copies: make the copy.
        beside_passes: whether a step waits at the end of its closure.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)
    >>> barrier = StepBarrier(Copies())
    >>> barrier.follow([optimizer])
    >>> barrier.begin(written=lambda: False, torn=lambda: None)
    >>> optimizer.step(); barrier.close()
    """

    def __init__(self, copies: Copies, *, beside_passes: bool = False) -> None:
        self._copies, self._beside_passes = copies, beside_passes
        self._in_flight: tuple[Callable[[], bool], Callable[[], None]] | None = None
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Has the steps of these optimizers come after the copies."""
        found = list(optimizers)
        if found != self._optimizers:
            self._remove_hooks()
            self._optimizers = found
            self._handles = [o.register_step_pre_hook(self._before_step) for o in found]

    def begin(self, *, written: Callable[[], bool], torn: Callable[[], None]) -> None:
        """Records that a copy has begun.

        Args:
            written: returns whether a source was written since the copy began.
            torn: called if so, as the copy may be torn.
        """
        self._in_flight = None if self._copies.immediate else (written, torn)

    @property
    def is_copying(self) -> bool:
        """Whether a copy is made that no step has come after yet."""
        return self._in_flight is not None

    def wait(self) -> None:
        """Has what the caller does next come after the copy, and reports one that may be torn."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return
        self._copies.wait()
        written, torn = in_flight
        if written():
            torn()

    def finish(self) -> None:
        """Has the host wait until the copy is complete, and reports one that may be torn."""
        self.wait()
        self._copies.finish()

    def close(self) -> None:
        """Waits for the copy, and removes the hooks of the optimizers."""
        self._in_flight = None
        self._copies.finish()
        self._remove_hooks()

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Waits, or returns the arguments of the step with a closure that waits at its end."""
        if not self.is_copying:
            return None
        optimizer, *given = args
        closure = options["closure"] if "closure" in options else next(iter(given), None)
        if closure is None or not self._beside_passes:
            self.wait()
            return None

        def waiting() -> Any:
            loss = closure()
            self.wait()
            return loss

        if "closure" in options:
            return args, {**options, "closure": waiting}
        return (optimizer, waiting, *given[1:]), options

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
