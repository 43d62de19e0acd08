"""Measures how much memory snapshots may take, on the device and on the host.

May import torch, but not Lightning.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lit_stability.training_state.control_groups import free_in_groups, lines_of

if sys.platform != "win32":
    import resource

_HEADROOM = 0.05
"""Share of a memory that snapshots leave free."""


def free_on_device(device: torch.device) -> int | None:
    """Returns the bytes of an accelerator that nobody uses, less a reserve; None for the CPU.

    Memory that torch keeps for itself is not counted as free: it is needed for activations again.
    """
    if device.type == "cpu":
        return None
    memory = getattr(torch.get_device_module(device), "mem_get_info", None)
    if memory is None:
        return 0
    free, total = memory(device)
    return max(0, int(free - _HEADROOM * total))


def free_on_host(sharers: int = 1) -> int:
    """Returns the bytes of host memory that this process may use beyond its peak, less a reserve.

    The least of the machine's available memory, of the rest below the limits of the control groups,
    and of the rest below the limit on the address space. A step needs again what it has needed at
    the peak, such as gradients, although it is free between two steps.

    Args:
        sharers: processes of this run on the machine, each of which takes as much. The limit on
            the address space is one process's own.
    """
    status = _status()
    resident = max(0, status.get("VmHWM", 0) - status.get("VmRSS", 0))
    found = [free // sharers - resident for free in (_available(), *free_in_groups())]
    found += [limit - status.get("VmPeak", 0) for limit in _address_limits()]
    return max(0, int(min(found) * (1 - _HEADROOM)))


def _status() -> dict[str, int]:
    """Returns the sizes of this process in bytes."""
    rows = (line.partition(":") for line in lines_of(Path("/proc/self/status")))
    return {name: int(size.split()[0]) * 1024 for name, _, size in rows if size.endswith("kB")}


def _available() -> int:
    for line in lines_of(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63


def _address_limits() -> list[int]:
    if sys.platform == "win32":
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit == resource.RLIM_INFINITY else [limit]
