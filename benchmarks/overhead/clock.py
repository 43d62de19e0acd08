"""A clock around everything that callbacks do in a step: their hooks, and what they do at a fetch.

Time spent in hooks tells more finely than the difference of two steps what a suite costs: it does
not hold the noise of the step. What it leaves out is what the step pays afterwards, for caches that
the suite has emptied.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer


class HookClock:
    """Adds up the seconds inside a list of callbacks, step by step.

    Hooks that callbacks call on each other count once. To be attached before the fit; a step ends
    where `next_step` is called.

    Args:
        callbacks: whose hooks to time.
        now: seconds; of the wall, or of the thread's own processor time where the machine is busy.
    """

    def __init__(
        self, callbacks: list[Callback], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = now
        self.steps: list[float] = []
        """Seconds of each step."""
        self.parts: dict[str, float] = {}
        """Seconds of all steps, by class and hook, hooks that are called from inside included."""
        self._now, self._depth = 0.0, 0
        for callback in callbacks:
            for name in _hooks_of(callback):
                setattr(callback, name, self._timed(callback, name))

    def _timed(self, callback: Callback, name: str) -> Callable[..., Any]:
        return self.timed(getattr(callback, name), f"{type(callback).__name__}.{name}")

    def timed(self, call: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The same call, counted."""

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                seconds = self._clock() - start
                self._depth -= 1
                self.parts[label] = self.parts.get(label, 0.0) + seconds
                if not self._depth:
                    self._now += seconds

        return counted

    def watch_fetches(self, trainer: Trainer) -> None:
        """Count the fetches too, the loader's own work included; once the fit has begun."""
        fetcher: Any = trainer.fit_loop._data_fetcher
        kind = type(fetcher)
        fetch = self.timed(kind.__next__, "fetch")
        fetcher.__class__ = type(kind.__name__, (kind,), {"__next__": fetch})

    def next_step(self) -> None:
        """What comes now belongs to the next step."""
        self.steps.append(self._now)
        self._now = 0.0


def _hooks_of(callback: Callback) -> list[str]:
    """Hooks of a step that the callback defines, Lightning's and this package's."""
    names = (n for n in dir(type(callback)) if n.startswith("on_") or n == "probe_readings")
    own = (n for n in names if getattr(type(callback), n) is not getattr(Callback, n, None))
    return [n for n in own if callable(getattr(callback, n))]
