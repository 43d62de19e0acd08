"""Ranks that may die, over gloo: their exit codes, what they printed, and when each ended."""

import os
import time
import traceback
from dataclasses import dataclass

import torch

from tests.distributed import CONTEXT, _free_port


@dataclass
class Ended:
    """One rank after its end."""

    code: int | None
    """Exit code, minus the signal that ended it; None if it had to be ended after the timeout."""
    output: str
    seconds: float
    """From the common start of all ranks."""
    value: object


def run_mortal_ranks(function, *args, ranks=2, timeout=60, folder):
    """Runs ``function(*args)`` on each rank, and returns how each `Ended`."""
    folder.mkdir(parents=True, exist_ok=True)
    port, began = _free_port(), time.monotonic()
    processes = [
        CONTEXT.Process(
            target=_rank, args=(function, args, rank, ranks, port, folder), daemon=False
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    ended = [None] * ranks
    try:
        while None in ended and time.monotonic() < began + timeout:
            for rank, process in enumerate(processes):
                if ended[rank] is None and not process.is_alive():
                    ended[rank] = time.monotonic() - began
            time.sleep(0.02)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)
    return [
        Ended(code, _text(folder / f"rank{rank}.log"), seconds or timeout, _value(folder, rank))
        for rank, (code, seconds) in enumerate(zip(codes, ended, strict=True))
    ]


def _text(path):
    return path.read_text(errors="replace") if path.exists() else ""


def _value(folder, rank):
    path = folder / f"rank{rank}.pt"
    return torch.load(path, weights_only=False) if path.exists() else None


def _rank(function, args, rank, ranks, port, folder):
    """In the new process."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), folder / f"rank{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Skips the destructors of process groups, which may wait for a rank that is gone.
    os._exit(0)
