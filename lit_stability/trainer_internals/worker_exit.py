"""Runs what is left to do when a worker process of a launcher ends by an exception.

With ``ddp_spawn``, ``ddp_fork`` and in notebooks the fit runs in worker processes, but Lightning
calls ``on_exception`` in the parent process only, which has not seen the fit.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.util import Finalize


def at_worker_exit(call: Callable[[], None]) -> Callable[[], None]:
    """Has a function called when this process ends, if it is a worker.

    Args:
        call: function without arguments.

    Returns:
        A function that cancels it, at the regular end of the fit.
    """
    if multiprocessing.parent_process() is None:
        return lambda: None
    finalize = Finalize(None, call, exitpriority=10)

    def cancel() -> None:
        finalize.cancel()

    return cancel
