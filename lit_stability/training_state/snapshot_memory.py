"""Decides how many snapshots are kept, and where: on the device of the weights, or on the host.

Pure arithmetic on numbers of bytes; imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lit_stability.training_state.byte_sizes import as_text

Where = Literal["auto", "device", "host"]
Place = Literal["device", "host"]
Tier: TypeAlias = tuple[Place, ...]
"""Where each of the snapshots is kept, the first one first."""

TIERS: tuple[Tier, ...] = (
    ("device", "device"),
    ("device", "host"),
    ("host", "host"),
    ("device",),
    ("host",),
    (),
)
"""Every choice, the best one first: two are worth more than one, and the device is faster."""
UNLIMITED = 2**63


@dataclass(frozen=True)
class Needs:
    """Bytes that the suite takes on one rank."""

    snapshot: int
    """Of one snapshot."""
    frozen: int = 0
    """Of the frozen weights, of which there is one copy."""
    batches: int = 0
    """Of the batches to replay, as far as they are known to grow."""
    batches_held: int = 0
    incident: int = 0
    """Of what is copied at an incident, to run its step again."""

    @property
    def beside(self) -> int:
        """All that comes beside the snapshots and the batches."""
        return self.frozen + self.incident


@dataclass(frozen=True)
class Memory:
    """Bytes that are free on one rank, beyond those of the snapshots that it holds."""

    device: int | None
    """Of an accelerator; None if the weights are in the memory of the host."""
    host: int
    budget: int | None = None
    """What the user allows the suite, in both memories together; None if there is no bound."""


@dataclass(frozen=True)
class Homes:
    """Where each of the snapshots is kept, the first one first."""

    of: Tier
    reason: str = ""
    """Why not all are on the device; empty if they are, or if the user has chosen so."""

    def __str__(self) -> str:
        number = ("no snapshot", "one snapshot", "two snapshots")[len(self.of)]
        places = [place for place in ("device", "host") if place in self.of]
        where = " and ".join({"device": "on the device", "host": "on the host"}[p] for p in places)
        shown = "" if self.of in ((), ("device", "device")) else f" {where}"
        return number + shown + (f", as {self.reason}" if self.reason else "")


def tiers_for(where: Where, *, on_accelerator: bool) -> tuple[Tier, ...]:
    """Returns the choices that a user's wish leaves, the best one first.

    >>> tiers_for("auto", on_accelerator=False)
    (('device', 'device'), ('device',), ())
    """
    if where != "auto":
        return tuple(tier for tier in TIERS if set(tier) <= {where})
    return TIERS if on_accelerator else tiers_for("device", on_accelerator=False)


def choose_homes(ranks: Sequence[tuple[Needs, Memory]], tiers: Sequence[Tier] = TIERS) -> Homes:
    """Chooses the best tier that every rank has the memory for.

    One snapshot is kept even if not all batches since it can be kept beside it.

    Args:
        ranks: what each rank needs and has, in their order.
        tiers: to choose from, the best one first; the last one holds no snapshot.

    >>> memory = Memory(device=2**20, host=5 * 2**20)
    >>> print(choose_homes([(Needs(4 * 2**20), memory)]))
    one snapshot on the host, as two do not fit into 1 MiB on the device and 5 MiB on the host
    """
    whole = [tier for tier in tiers if tier and all(_fits(tier, *rank) for rank in ranks)]
    partly = [tier for tier in tiers if len(tier) == 1 and all(_fits(tier, *r, 0) for r in ranks)]
    found = [*whole, *partly, ()][0]
    return Homes(found, "" if found == tiers[0] else _reason(found, ranks, tiers))


def _fits(tier: Tier, needs: Needs, memory: Memory, batches: int | None = None) -> bool:
    """Returns whether a rank has the memory for a tier.

    Args:
        tier: to be tested.
        needs: of the rank.
        memory: of the rank.
        batches: bytes of batches beside the snapshots; None for all that are needed.
    """
    batches = needs.batches if batches is None else batches
    to_come = max(0, batches - needs.batches_held)
    on_device, on_host = (tier.count(place) * needs.snapshot for place in ("device", "host"))
    if memory.device is None:
        host_free = on_device + on_host + to_come + needs.incident <= memory.host
        device_free = True
    else:
        host_free = not on_host or on_host + to_come <= memory.host
        device_free = not on_device or on_device + needs.incident <= memory.device
    total = len(tier) * needs.snapshot + needs.beside + batches
    return host_free and device_free and (memory.budget is None or total <= memory.budget)


def _reason(found: Tier, ranks: Sequence[tuple[Needs, Memory]], tiers: Sequence[Tier]) -> str:
    """Returns what does not fit and where, on the first rank that the best tier does not fit."""
    rank = next((i for i, each in enumerate(ranks) if not _fits(tiers[0], *each)), 0)
    needs, memory = ranks[rank]
    of_rank = f" of rank {rank}" if len(ranks) > 1 else ""
    what = "two do not fit" if found else "none fits"
    if memory.budget is not None and _fits(tiers[0], needs, replace(memory, budget=None)):
        beside = needs.beside + needs.batches
        return (
            f"{what} into memory_budget={as_text(memory.budget)} beside {as_text(beside)} of "
            f"batches and other copies{of_rank}"
        )
    shown: dict[str, int | None] = {"device": memory.device}
    if len(found) < 2:
        shown["host"] = memory.host
    memories = [
        f"{size / 2**20:.0f} MiB on the {n}" for n, size in shown.items() if size is not None
    ]
    return f"{what} into {' and '.join(memories)}{of_rank}"
