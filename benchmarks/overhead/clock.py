"""Clock around the work of callbacks in a step: their hooks, and the fetch of a batch.

The time in hooks measures the cost of a suite more precisely than the difference of two steps,
because it does not contain the noise of the step. It excludes the cost of CPU caches that the suite
has evicted, which the rest of the step pays.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer


class HookClock:
    """Sums the seconds that callbacks spend in their hooks, step by step.

    Nested hook calls count once. Create it before the fit; `next_step` ends a step.

    Args:
        callbacks: Callbacks whose hooks are timed.
        now: Clock in seconds: wall-clock time, or the thread's processor time on a busy machine.
    """

    def __init__(
        self, callbacks: list[Callback], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = now
        self.steps: list[float] = []
        """Seconds of each step."""
        self.parts: dict[str, float] = {}
        """Seconds of all steps by class and hook, including nested hook calls."""
        self._current, self._depth = 0.0, 0
        for callback in callbacks:
            for name in _hooks_of(callback):
                setattr(callback, name, self._timed(callback, name))

    def _timed(self, callback: Callback, name: str) -> Callable[..., Any]:
        return self.timed(getattr(callback, name), f"{type(callback).__name__}.{name}")

    def timed(self, call: Callable[..., Any], label: str) -> Callable[..., Any]:
        """Wraps a call so that its time is added."""

        @functools.wraps(call)
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                seconds = self._clock() - start
                self._depth -= 1
                self.parts[label] = self.parts.get(label, 0.0) + seconds
                if not self._depth:
                    self._current += seconds

        return timed_call

    def watch_fetches(self, trainer: Trainer) -> None:
        """Adds the time of batch fetches, loader included; call it after the fit has started."""
        fetcher: Any = trainer.fit_loop._data_fetcher
        kind = type(fetcher)
        fetch = self.timed(kind.__next__, "fetch")
        fetcher.__class__ = type(kind.__name__, (kind,), {"__next__": fetch})

    def next_step(self) -> None:
        """Ends the current step."""
        self.steps.append(self._current)
        self._current = 0.0


def _hooks_of(callback: Callback) -> list[str]:
    """Returns the hooks that the callback overrides, Lightning's and this package's."""
    names = (n for n in dir(type(callback)) if n.startswith("on_") or n == "probe_readings")
    own = (n for n in names if getattr(type(callback), n) is not getattr(Callback, n, None))
    return [n for n in own if callable(getattr(callback, n))]
