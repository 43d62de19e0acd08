"""Decides where snapshots are kept: on the device of the weights, or in the memory of the host.

May import torch, but not Lightning.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

if sys.platform != "win32":
    import resource

Where = Literal["auto", "device", "host"]
Place = Literal["device", "host"]
_HEADROOM = 0.05
"""Share of a memory that snapshots leave free."""


@dataclass(frozen=True)
class Homes:
    """Where each of the snapshots is kept, the first one first."""

    of: tuple[Place, ...]
    reason: str = ""
    """Why not all are on the device; empty if they are, or if the user has chosen so."""

    def __str__(self) -> str:
        number = "two snapshots" if len(self.of) == 2 else "one snapshot"
        places = [place for place in ("device", "host") if place in self.of]
        where = " and ".join({"device": "on the device", "host": "on the host"}[p] for p in places)
        shown = "" if self == Homes(("device", "device")) else f" {where}"
        return number + shown + (f", as {self.reason}" if self.reason else "")


def choose_homes(nbytes: int, *, device: int | None, host: int) -> Homes:
    """Chooses the fastest memory that two snapshots fit into, or else one.

    Args:
        nbytes: size of one snapshot.
        device: free bytes of an accelerator; None if the weights are in the memory of the host.
        host: free bytes of the host.

    >>> choose_homes(4, device=10, host=100).of, choose_homes(4, device=6, host=100).of
    (('device', 'device'), ('device', 'host'))
    >>> print(choose_homes(4 * 2**20, device=2**20, host=5 * 2**20))
    one snapshot on the host, as two do not fit into 1 MiB on the device and 5 MiB on the host
    """
    if device is None:
        places = _count("device", nbytes, host) or ("device",)
        return Homes(places, _reason(places, {"host": host}))
    places = _count("device", nbytes, device)
    places = (*places, *_count("host", nbytes, host))[:2] or ("host",)
    return Homes(places, _reason(places, {"device": device, "host": host}))


def _count(place: Place, nbytes: int, free: int) -> tuple[Place, ...]:
    return (place,) * min(2, free // max(nbytes, 1))


def _reason(places: tuple[Place, ...], free: dict[str, int]) -> str:
    if places == ("device", "device"):
        return ""
    shown = free if len(places) == 1 else {"device": free["device"]}
    memories = [f"{size / 2**20:.0f} MiB on the {name}" for name, size in shown.items()]
    return f"two do not fit into {' and '.join(memories)}"


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


def free_on_host() -> int:
    """Returns the bytes of host memory that this process may use beyond its peak, less a reserve.

    The least of the machine's available memory, of the rest below the limit of the control group,
    and of the rest below the limit on the address space. A step needs again what it has needed at
    the peak, such as gradients, although it is free between two steps.
    """
    status = _status()
    resident = max(0, status.get("VmHWM", 0) - status.get("VmRSS", 0))
    found = [free - resident for free in (_available(), *_below_groups())]
    found += [limit - status.get("VmPeak", 0) for limit in _address_limits()]
    return max(0, int(min(found) * (1 - _HEADROOM)))


def _status() -> dict[str, int]:
    """Returns the sizes of this process in bytes."""
    rows = (line.partition(":") for line in _lines("/proc/self/status"))
    return {name: int(size.split()[0]) * 1024 for name, _, size in rows if size.endswith("kB")}


def _available() -> int:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63


def _below_groups() -> list[int]:
    """Returns what is left below the memory limit of the control group, in version 2 or 1."""
    pairs = (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
    found = []
    for pair in pairs:
        limit, usage = (_number(f"/sys/fs/cgroup/{name}") for name in pair)
        if limit is not None and usage is not None:
            found.append(max(0, limit - usage))
    return found


def _address_limits() -> list[int]:
    if sys.platform == "win32":
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit == resource.RLIM_INFINITY else [limit]


def _number(path: str) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf8").splitlines()
    except OSError:
        return []
