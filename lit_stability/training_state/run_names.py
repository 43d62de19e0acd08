"""Names of runs. Imports neither torch nor Lightning."""

from __future__ import annotations

import secrets
import time

RUNS = "stability"
"""Name of the folder, in ``default_root_dir``, with one folder for each run without a logger; the
names of these begin with the time of their start."""


def new_run_name() -> str:
    """Returns a name that sorts by time and is different in two processes at the same time.

    Date, time, milliseconds and two random digits: ``20260301-023000-4179f``.
    """
    now = time.time()
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return f"{moment}-{int(now * 1000) % 1000:03d}{secrets.token_hex(1)}"
