"""The thread that watches this rank and, when it stands still, the others. Imports no Lightning."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from lit_stability.distributed.heartbeat import PHASES, Beat, Heartbeat, allowed_seconds
from lit_stability.distributed.heartbeat_exchange import FAST, HOST, BeatExchange, Meeting
from lit_stability.distributed.heartbeat_frames import collective_of, is_compiling
from lit_stability.distributed.heartbeat_stragglers import Straggler, StragglerWatch
from lit_stability.distributed.heartbeat_verdict import Seen, Verdict, judge


@dataclass(frozen=True)
class Limits:
    """How long ranks may stay where they are; see `RankWatchdog`."""

    timeout: float
    silent_after: float
    slow_factor: float
    interval: float


@dataclass(frozen=True)
class TrainerView:
    """What the thread asks the Trainer, at any time."""

    step: Callable[[], int]
    searching: Callable[[], bool]
    """Whether a tuner uses the Trainer, and calls other callbacks."""
    interrupted: Callable[[], bool]
    """Whether an exception is ending the fit."""
    over: Callable[[], bool]
    """Whether an exception has left ``Trainer.fit``."""


class RankWatch:
    """Watches one fit, from its start to its end.

    Time is counted only while this thread runs: a job that was suspended has not been idle.

    Args:
        meeting: of all ranks.
        limits: how long ranks may stay where they are.
        trainer: what to ask the Trainer.
        stragglers: finds slow ranks, on rank 0; None for no report of them.
        report_straggler: called once for each slow rank.
        obey: ends this process as a verdict asks for; does not return.
    """

    def __init__(
        self,
        meeting: Meeting,
        limits: Limits,
        trainer: TrainerView,
        stragglers: StragglerWatch | None,
        report_straggler: Callable[[Straggler], None],
        obey: Callable[[RankWatch, Verdict], NoReturn],
    ) -> None:
        self.meeting, self.limits, self.trainer = meeting, limits, trainer
        self.heart = Heartbeat()
        self.exchange = BeatExchange(meeting, self.own_beat, limits.interval)
        self.ending = False
        """Whether this process is being ended as a verdict asks for."""
        self._stragglers, self._report_straggler = stragglers, report_straggler
        self._obey = obey
        self._training = threading.get_ident()
        self._now, self._idle, self._place = 0.0, 0.0, self.heart.place
        self._rounds, self._numbers = 0, dict.fromkeys(self.exchange.beats, 0)
        self._changed = dict.fromkeys(self.exchange.beats, 0.0)
        self._over_since: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watchdog", daemon=True)

    def start(self) -> None:
        """Starts to publish and to watch."""
        # A thread that is inside of torch when the interpreter ends would crash it.
        atexit.register(self.stop)
        self.exchange.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends both threads."""
        atexit.unregister(self.stop)
        self._stop.set()
        self.exchange.stop(within=2.0)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2.0)

    def own_beat(self, number: int) -> Beat:
        """Returns what this rank publishes now."""
        heart, still = self.heart, self._stands_still
        phase = PHASES[heart.phase]
        if self.trainer.searching():
            phase = "search"
        elif still and is_compiling(self._training):
            phase = "compiling"
        interrupted = heart.state == "running" and self.trainer.interrupted()
        beat = Beat(
            number=number,
            phase=phase,
            batches=heart.batches,
            events=heart.events,
            step=self.trainer.step(),
            idle=self._idle,
            waits=collective_of(self._training) if still else "",
            state="raised" if interrupted else heart.state,
            message=heart.message,
            host_state=self.exchange.beats[HOST].state,
            closed=self.exchange.closing,
            totals=list(heart.totals),
        )
        allowed = allowed_seconds(heart, beat, self.limits.timeout, self.limits.slow_factor)
        return Beat(**{**vars(beat), "allowed": allowed})

    def ended(self) -> None:
        """Called at the regular end of the fit; waits for ranks that are still in their loop.

        One that will never come has this process end with the others, and not without a word.
        """
        self.heart.state = "ended"
        self._wait(self._all_have_left, self.limits.timeout * self.limits.slow_factor)
        self.stop()

    def raised(self, message: str) -> dict[int, Seen]:
        """Called when an exception ends the fit; returns what is known of each rank.

        The thread goes on until the exception has left ``Trainer.fit``: what the Trainer does
        before may wait for other ranks.

        Args:
            message: type and text of the exception.
        """
        self.heart.message, self.heart.state = message, "raised"
        before, looked = dict(self._numbers), self.exchange.looked
        self._wait(lambda: self._all_are_known(before, looked), 3 * self.limits.interval)
        return self.ranks()

    def ranks(self) -> dict[int, Seen]:
        """Returns what this rank knows of each, itself included."""
        beats, identities = self.exchange.beats, self.meeting.identities
        me = self.meeting.rank
        seen = {}
        for rank, beat in beats.items():
            gone = rank != me and self._is_gone(rank)
            over = gone or beat.state == "raised"
            since = self._over_since.setdefault(rank, self._now) if over else self._now
            seen[rank] = Seen(
                beat=self.own_beat(beat.number) if rank == me else beat,
                who=str(identities[rank]),
                silent=self._now - self._changed[rank],
                gone=gone,
                over_for=self._now - since,
            )
        return seen

    def _is_gone(self, rank: int) -> bool:
        """Whether the process of a rank has ended for sure."""
        lost = rank == HOST and self.exchange.lost and not self.exchange.beats[rank].over
        own, other = (self.meeting.identities[r] for r in (self.meeting.rank, rank))
        return lost or other.has_ended(own)

    @property
    def _stands_still(self) -> bool:
        return self._idle >= 2 * self.limits.interval

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(FAST if self.exchange.hurries else self.limits.interval):
            now = time.monotonic()
            # A longer time has passed while this process, or the whole job, was suspended.
            self._advance(min(now - last, 2 * self.limits.interval))
            last = now
            if self.heart.state == "raised" and self.trainer.over():
                self._close()
            elif self.exchange.verdict is not None:
                self._end(self.exchange.verdict)
            else:
                self._watch()

    def _advance(self, seconds: float) -> None:
        """Counts the time that the training thread and the other ranks stand still."""
        self._now += seconds
        moved = self.heart.place != self._place or self.trainer.searching()
        self._idle = 0.0 if moved else self._idle + seconds
        self._place = self.heart.place
        heard = self.exchange.rounds != self._rounds
        self._rounds = self.exchange.rounds
        for rank, beat in self.exchange.beats.items():
            # While the store does not answer, only its host is known to be silent.
            unknown = rank != HOST and not (heard and self.exchange.looks)
            if beat.number != self._numbers[rank]:
                self._changed[rank] = self._now
            elif unknown:
                self._changed[rank] += seconds
            self._numbers[rank] = beat.number

    def _watch(self) -> None:
        """Asks for a verdict if this rank stands still, and for slow ranks if it does not."""
        measures = self._stragglers is not None
        self.exchange.looks = measures or self._stands_still or self.heart.state != "running"
        if self._stands_still:
            limits, place = self.limits, self.heart.place
            verdict = judge(
                self.meeting.rank, self.ranks(), limits.silent_after, limits.slow_factor
            )
            if verdict is not None and self.heart.place == place:
                self._agree(verdict)
        elif self._stragglers is not None:
            found = self._stragglers.update(dict(self.exchange.beats))
            if found is not None:
                self._report_straggler(found)

    def _agree(self, verdict: Verdict) -> NoReturn:
        """Has all ranks obey the first verdict that was proposed; without a store, this one."""
        self.exchange.propose(verdict)
        deadline = time.monotonic() + 3.0
        while self.exchange.verdict is None and self.has_store(verdict):
            if time.monotonic() > deadline:
                break
            time.sleep(FAST)
        self._end(self.exchange.verdict or verdict)

    def has_store(self, verdict: Verdict) -> bool:
        """Returns whether the ranks can still talk to each other."""
        mute = verdict.ranks if verdict.kind in ("died", "silent") else ()
        return not self.exchange.lost and HOST not in mute

    def _end(self, verdict: Verdict) -> NoReturn:
        self.ending = self.exchange.hurries = True
        self._obey(self, verdict)

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        """Waits in the training thread until something is true of the other ranks."""
        self.exchange.looks = self.exchange.hurries = True
        self.exchange.wake()
        deadline = time.monotonic() + seconds
        while self.ending or (time.monotonic() < deadline and not done()):
            time.sleep(FAST / 2)
        self.exchange.hurries = False

    def _all_have_left(self) -> bool:
        # What a rank that has closed knows of the others does not change any more.
        closed = self.exchange.lost or self.exchange.closing
        return closed or all(map(self._has_left, self._others().items()))

    def _has_left(self, other: tuple[int, Beat]) -> bool:
        rank, beat = other
        # Rank 0 has the store, which the others need until they have closed.
        left = beat.closed if self.meeting.rank == HOST else beat.over or beat.phase == "end"
        return left or self._is_gone(rank)

    def _close(self) -> None:
        """Ends the threads once an exception has left the fit."""
        deadline = time.monotonic() + 2.0
        self.exchange.looks = self.exchange.hurries = True
        while time.monotonic() < deadline and not self._stop.wait(FAST):
            # The others of a fit that ended on all ranks; those that still run are not waited for.
            ending = {r: b for r, b in self._others().items() if b.over}
            if self.meeting.rank != HOST or all(map(self._has_left, ending.items())):
                break
        self.stop()

    def _all_are_known(self, before: Mapping[int, int], looked: int) -> bool:
        """Whether each other rank has raised too, has published since, or is gone.

        Args:
            before: numbers of the beats that were known before.
            looked: how often all beats had been read before.
        """

        def known(rank: int, beat: Beat) -> bool:
            aware = self.meeting.rank != HOST or beat.host_state != "running"
            return beat.over or (beat.number > before[rank] and aware) or self._is_gone(rank)

        # One more than the next, which may have begun before.
        fresh = self.exchange.lost or self.exchange.looked > looked + 1
        return fresh and all(known(rank, beat) for rank, beat in self._others().items())

    def _others(self) -> dict[int, Beat]:
        return {r: b for r, b in self.exchange.beats.items() if r != self.meeting.rank}
