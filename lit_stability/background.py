"""Calls to a network that no training step waits for.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from lit_stability.outside import guarded, tried

_FIRST_WAIT = 1.0
"""Seconds before a call that failed is made again; twice as long each further time."""


class Background:
    """Makes calls one after another in a thread of its own, and makes those that fail again.

    What fails for good is logged once; a queue that is full drops its oldest calls.

    Args:
        name: of the thread.
        tries: how often a call is made at most.
        most: number of calls that may wait.
    """

    def __init__(self, name: str, *, tries: int = 3, most: int = 1000) -> None:
        self._name, self._tries = name, tries
        self._waiting: deque[tuple[str, Callable[[], object]]] = deque(maxlen=most)
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None

    def call(self, what: str, call: Callable[[], object]) -> None:
        """Has a call made soon.

        Args:
            what: what fails if it raises, see `lit_stability.outside.guarded`.
            call: the call.
        """
        with self._changed:
            self._waiting.append((what, call))
            self._closed = False
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, seconds: float) -> bool:
        """Waits for what is left, for some seconds at most; calls that fail are repeated at once.

        Returns:
            Whether all calls were made.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._waiting or self._busy:
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    return not (self._waiting or self._busy)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        self._thread = None
                        return
                    self._changed.wait()
                (what, call), self._busy = self._waiting.popleft(), True
            self._make(what, call)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _make(self, what: str, call: Callable[[], object]) -> None:
        for number in range(self._tries - 1):
            if tried(call)[1] is None:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _FIRST_WAIT * 2**number)
        guarded(self, what, call)
