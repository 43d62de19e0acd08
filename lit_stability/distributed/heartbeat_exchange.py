"""Publishes the beats of this rank and reads those of the others, in a thread of its own.

All ranks use one TCPStore, in the process of rank 0; a thread that does nothing else talks to it,
because an operation blocks for as long as that process is stopped. When rank 0 dies the connections
break, which tells the others. May import torch.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lit_stability.distributed.heartbeat import Beat
from lit_stability.distributed.heartbeat_process import ProcessIdentity
from lit_stability.distributed.heartbeat_verdict import Verdict

CONNECT = timedelta(seconds=60)
"""How long a rank tries to reach the store at the start of a fit."""

FAST = 0.05
"""Seconds between two publications at the end of a fit, when ranks wait for each other."""

HOST = 0
"""The rank in whose process the store is."""


@dataclass
class Meeting:
    """What all ranks know of each other from the start of a fit."""

    rank: int
    identities: list[ProcessIdentity]
    address: tuple[str, int]
    server: Any
    """The store, on the rank that hosts it; None on the others."""
    shared: Any
    """What rank 0 gave to all."""


def meet(shared: Any) -> Meeting:
    """Starts the store on rank 0, and gives its address to all ranks.

    All ranks of the default process group must call it at the same place.

    Args:
        shared: that of rank 0 is given to all, picklable.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    server = _serve(world) if rank == HOST else None
    # Under torchrun, and wherever torch was started by its environment, this reaches rank 0.
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    address = (host, 0 if server is None else server.port)
    group = dist.new_group(backend="gloo")
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (ProcessIdentity.current(), address, shared), group=group)
    dist.destroy_process_group(group)
    return Meeting(
        rank, [each[0] for each in gathered], gathered[HOST][1], server, gathered[HOST][2]
    )


def _serve(world: int) -> Any:
    """A store on a free port, with an empty beat of each rank."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for rank in range(world):
        store.set(_key(rank), "")
    return store


def _key(rank: int) -> str:
    return f"beat{rank}"


class BeatExchange:
    """Talks to the store; what it has read is in its attributes, for other threads to look at.

    Args:
        meeting: of all ranks.
        own: returns the beat to publish, given its number.
        interval: seconds between two publications.
    """

    def __init__(self, meeting: Meeting, own: Callable[[int], Beat], interval: float) -> None:
        self.meeting, self.interval = meeting, interval
        self._own = own
        world = len(meeting.identities)
        self.beats = {rank: Beat() for rank in range(world)}
        """Latest beat of each rank, as far as it was read."""
        self.rounds = 0
        """Completed rounds of publishing and reading."""
        self.looked = 0
        """Rounds in which the beats of all ranks were read."""
        self.lost = False
        """Whether the store cannot be reached any more: the process of rank 0 is gone."""
        self.closing = False
        """Whether the store is used for the last time."""
        self.verdict: Verdict | None = None
        """The verdict of the first rank that proposed one, which all obey."""
        self.looks = False
        """Whether to read the beats of all ranks in each round, and not that of rank 0 alone."""
        self.hurries = False
        """Whether to go on with the next round at once."""
        self.written = 0
        """Ranks that have written what the verdict asks of them."""
        self._proposal: Verdict | None = None
        self._wrote = False
        self._every = max(1, world // 32)
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat exchange", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, within: float) -> None:
        """Ends the thread, and the store if it is in this process.

        Args:
            within: seconds to wait; an operation on a store that is stopped never ends.
        """
        self._stop.set()
        self.wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(within)
        self.meeting.server = None

    def wake(self) -> None:
        """Has the next round begin at once."""
        self._wake.set()

    def propose(self, verdict: Verdict) -> None:
        """Has all ranks obey a verdict, unless they have another one already."""
        self._proposal = verdict
        self.wake()

    def wrote(self) -> None:
        """Lets the others know that this rank has written its part."""
        self._wrote = True
        self.wake()

    def _run(self) -> None:
        try:
            store = self.meeting.server or TCPStore(
                *self.meeting.address, is_master=False, wait_for_workers=False, timeout=CONNECT
            )
            while not self._stop.is_set() and not self._may_close():
                self._round(store)
                self._wake.wait(FAST if self.hurries else self.interval)
                self._wake.clear()
            self.closing = True
            self._publish(store)
        except Exception:
            self.lost = True

    def _round(self, store: Any) -> None:
        self._publish(store)
        if self._looks_now():
            self._read(store, list(self.beats))
            self.looked += 1
        else:
            self._read(store, [HOST])
        if self._proposal is not None:
            self.verdict = Verdict.from_text(
                store.compare_set("verdict", "", self._proposal.to_text())
            )
        elif self.verdict is None and store.check(["verdict"]):
            self.verdict = Verdict.from_text(store.get("verdict"))
        if self.verdict is not None:
            self.written = store.add("written", int(self._wrote))
            self._wrote = False
        self.rounds += 1

    def _may_close(self) -> bool:
        """Whether rank 0 has ended its fit, while this rank is still at work at the end of its own.

        Rank 0 then waits for nothing else; a rank that has ended too closes by itself.
        """
        own = self._own(self.rounds)
        return self.beats[HOST].state == "ended" and own.phase == "end" and own.state == "running"

    def _looks_now(self) -> bool:
        """Beats of many ranks are read less often: together that is a square of their number."""
        return self.looks and (self.hurries or self.rounds % self._every == 0)

    def _publish(self, store: Any) -> None:
        store.set(_key(self.meeting.rank), self._own(self.rounds + 1).to_text())

    def _read(self, store: Any, ranks: Sequence[int]) -> None:
        texts = store.multi_get([_key(rank) for rank in ranks])
        for rank, text in zip(ranks, texts, strict=True):
            self.beats[rank] = Beat.from_text(text)
