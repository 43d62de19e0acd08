"""What torchrun tells the processes that it starts, and how they agree before they train.

Imports torch, but not Lightning.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed

ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
RUN_ID = "TORCHELASTIC_RUN_ID"
_HAS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_calls = itertools.count()
"""Numbers the values of this process, which are in the store for good."""
_WAIT = timedelta(minutes=30)
"""How long the ranks wait for rank 0, which reads the last good checkpoint to check it."""


def is_under_torchrun() -> bool:
    """Returns whether torchrun has started this process as one of several."""
    return RUN_ID in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def attempt() -> int:
    """Returns how often torchrun has restarted the processes; 0 in the first attempt."""
    return int(os.environ.get(ATTEMPT, "0"))


def run_id() -> str:
    """Returns the name that torchrun gives to all attempts, as it may be part of a file name."""
    name = os.environ.get(RUN_ID, "none")
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def same_for_all_attempts(name: str, value: str) -> str:
    """Returns the value of the process that was the first to ask, on all ranks, in all attempts.

    Args:
        name: of the value.
        value: of this process. If torchrun shares no store, the name that torchrun has for the job
            is returned instead.
    """
    if os.environ.get(_HAS_STORE) != "True":
        return f"torchrun-{run_id()}"
    stores: Any = torch.distributed
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = stores.TCPStore(host, port, is_master=False, timeout=_WAIT)
    agreed: bytes = store.compare_set(f"lit_stability/{name}", "", value)
    return agreed.decode()


def use_new_store() -> None:
    """Has the ranks of a restarted attempt connect through a store that only they use.

    torchrun keeps one store for all attempts (seen in torch 2.13), so that a rank may find the
    address of a process of the attempt before, to which it cannot connect. Rank 0 now opens a store
    of its own. Nothing is done in the first attempt, or where torchrun shares no store.
    """
    if attempt() == 0 or os.environ.get(_HAS_STORE) != "True":
        return
    os.environ["MASTER_PORT"] = from_rank_0(_free_port)
    os.environ[_HAS_STORE] = "False"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def from_rank_0(compute: Callable[[], str]) -> str:
    """Returns what rank 0 computes, on every rank, before there is a process group.

    The ranks exchange it through the store of torchrun. Where torchrun offers none, each computes
    it. All ranks must call it, or none.

    Args:
        compute: runs on rank 0.

    Raises:
        RuntimeError: on the other ranks, if it raises on rank 0.
    """
    if not is_under_torchrun() or os.environ.get(_HAS_STORE) != "True":
        return compute()
    stores: Any = torch.distributed
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    base = stores.TCPStore(host, port, is_master=False, timeout=_WAIT)
    store, name = stores.PrefixStore(f"lit_stability/{attempt()}", base), str(next(_calls))
    if os.environ["RANK"] != "0":
        kind, _, value = store.get(name).decode().partition(":")
        if kind == "error":
            raise RuntimeError(f"rank 0 failed: {value}")
        return str(value)
    try:
        found = compute()
    except Exception as error:
        store.set(name, f"error:{type(error).__name__}: {error}")
        raise
    store.set(name, f"value:{found}")
    return found
