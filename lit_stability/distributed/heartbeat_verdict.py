"""Decides from what the ranks publish whether the fit hangs, and which rank is the reason.

Pure functions; a rank asks only when its own training thread stands still. Imports the standard
library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from lit_stability.distributed.heartbeat import Beat

WAITING_PATIENCE = 5.0
"""Seconds that a rank gives itself to get on although another is gone, if it waits for others."""

WORKING_PATIENCE = 60.0
"""The same, if it may be at work of its own."""


@dataclass(frozen=True)
class Seen:
    """What one rank knows of another, or of itself."""

    beat: Beat
    who: str = ""
    """Machine and process, as text."""
    silent: float = 0.0
    """Seconds since its last beat was published."""
    gone: bool = False
    """Whether its process has ended for sure."""
    over_for: float = 0.0
    """Seconds since it was first seen that its fit has ended or its process is gone."""


@dataclass(frozen=True)
class Verdict:
    """That the fit cannot go on, and why."""

    kind: str
    """``died``, ``raised``, ``silent``, ``left``, ``stalled`` or ``deadlock``."""
    ranks: tuple[int, ...]
    """The ranks that are the reason; none for a deadlock."""
    text: str
    """What happened, one sentence."""
    seconds: float
    """For how long."""
    reporter: int = 0
    """The lowest rank that is alive, which writes to the log."""
    living: int = 1
    """Number of ranks that can write their stacks."""

    def to_text(self) -> str:
        """Returns the verdict as text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Verdict:
        """Returns what `to_text` was called on."""
        values = json.loads(text)
        return cls(**{**values, "ranks": tuple(values["ranks"])})


def judge(
    me: int, ranks: Mapping[int, Seen], silent_after: float, slow_factor: float
) -> Verdict | None:
    """Returns why the fit cannot go on, None while it may.

    The reasons are looked at from the surest to the least sure: a process that is gone, an
    exception, no heartbeat, a loop that was left, and a rank that is behind for too long.

    Args:
        me: rank that asks.
        ranks: every rank, itself included.
        silent_after: seconds without a heartbeat after which a rank counts as stopped.
        slow_factor: multiplies them in slow phases.

    >>> far = Beat(number=9, phase="backward", batches=5, step=4, idle=700, allowed=600)
    >>> behind = Beat(number=9, phase="data", batches=4, step=4, idle=705, allowed=600)
    >>> judge(0, {0: Seen(far), 1: Seen(behind)}, 120, 3).text
    'rank 1 is behind: for 705 s in data, after batch 4 (step 4), while others are ahead'
    """
    own = ranks[me].beat
    if own.over:
        return None
    others = {rank: seen for rank, seen in ranks.items() if rank != me}
    found = (
        _over(own, others)
        or _silent(own, others, silent_after, slow_factor)
        or _left(own, others)
        or _stalled(own, ranks)
    )
    if found is None:
        return None
    mute = found.ranks if found.kind == "silent" else ()
    living = [r for r, s in ranks.items() if not (s.gone or s.beat.over or r in mute)]
    return replace(found, reporter=min(living), living=len(living))


def patience(beat: Beat) -> float:
    """Returns for how long a rank may stand still once another is gone, in seconds."""
    if beat.waits or beat.phase == "backward":
        return min(WAITING_PATIENCE, beat.allowed)
    if beat.phase in ("data", "forward", "optimizer"):
        return min(WORKING_PATIENCE, beat.allowed)
    return beat.allowed


def _over(own: Beat, others: Mapping[int, Seen]) -> Verdict | None:
    """A process that is gone, or an exception that has ended the fit of another rank."""
    gone = {r: s for r, s in others.items() if s.gone and s.beat.state != "raised"}
    raised = {r: s for r, s in others.items() if s.beat.state == "raised"}
    found = gone or raised
    waited = min(own.idle, max((s.over_for for s in found.values()), default=0.0))
    if not found or waited < patience(own):
        return None
    text = "; ".join(describe_over(rank, seen) for rank, seen in found.items())
    return Verdict("died" if gone else "raised", tuple(found), text, waited)


def describe_over(rank: int, seen: Seen) -> str:
    """Returns how the fit of a rank ended, as a sentence.

    Args:
        rank: its number.
        seen: what is known of it.
    """
    if seen.beat.state == "raised":
        what = seen.beat.message or "an exception"
        return f"rank {rank} has raised {what} {seen.beat.place}"
    if seen.beat.state == "ended":
        return f"rank {rank} has left the training loop {seen.beat.place}, and its process is gone"
    return f"the process of rank {rank} is gone ({seen.who}), last seen {seen.beat.place}"


def _silent(
    own: Beat, others: Mapping[int, Seen], silent_after: float, slow_factor: float
) -> Verdict | None:
    """A process that is stopped, or code that holds Python's lock, or a machine that is gone."""

    def limit(beat: Beat) -> float:
        return silent_after * (slow_factor if beat.slow else 1.0)

    found = {
        rank: seen
        for rank, seen in others.items()
        if not (seen.beat.over or seen.gone) and seen.silent >= limit(seen.beat) <= own.idle
    }
    if not found:
        return None
    for_seconds = max(seen.silent for seen in found.values())
    text = "; ".join(
        f"rank {rank} has sent no heartbeat for {seen.silent:.0f} s ({seen.who}): its process is "
        f"stopped, or code outside of Python holds the interpreter; last seen {seen.beat.place}"
        for rank, seen in found.items()
    )
    return Verdict("silent", tuple(found), text, for_seconds)


def _left(own: Beat, others: Mapping[int, Seen]) -> Verdict | None:
    """A rank that has left the training loop, while this one waits in it."""
    if own.phase == "end" or own.idle < own.allowed:
        return None
    # A rank that has done as many batches may wait for this one, which is then the one behind.
    found = {
        rank: seen.beat
        for rank, seen in others.items()
        if _has_left(seen.beat) and (own.waits or seen.beat.batches < own.batches)
    }
    if not found:
        return None
    text = "; ".join(
        f"rank {rank} has left the training loop after batch {beat.batches}, and others wait "
        f"{own.place}: it may have fewer batches than they have"
        for rank, beat in found.items()
    )
    return Verdict("left", tuple(found), text, own.idle)


def _stalled(own: Beat, ranks: Mapping[int, Seen]) -> Verdict | None:
    """The ranks that have come least far, if they too stand still for too long."""
    if own.phase == "end" or own.idle < own.allowed:
        return None
    if any(seen.gone or seen.beat.state == "raised" for seen in ranks.values()):
        return None
    running = {r: seen.beat for r, seen in ranks.items() if not _has_left(seen.beat)}
    least = min(beat.progress for beat in running.values())
    last = {rank: beat for rank, beat in running.items() if beat.progress == least}
    # Among those in one place, one that is at work keeps those waiting that wait in a collective.
    working = {rank: beat for rank, beat in last.items() if not beat.waits}
    last = working if any(beat.waits for beat in last.values()) and working else last
    if any(beat.idle < beat.allowed for beat in last.values()):
        return None
    if len(last) == len(ranks):
        return _deadlock(list(last.values()))
    idle = max(beat.idle for beat in last.values())
    text = "; ".join(
        f"rank {rank} is behind: for {beat.idle:.0f} s {beat.place}, while others are ahead"
        for rank, beat in last.items()
    )
    return Verdict("stalled", tuple(last), text, idle)


def _has_left(beat: Beat) -> bool:
    return beat.state == "ended" or beat.phase == "end"


def _deadlock(beats: Sequence[Beat]) -> Verdict:
    idle = min(beat.idle for beat in beats)
    text = f"all ranks are in the same place, {beats[0].place}, for {idle:.0f} s; none is behind"
    return Verdict("deadlock", (), text, idle)
