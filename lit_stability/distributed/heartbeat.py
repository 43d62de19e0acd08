"""What a rank publishes about itself while it trains, and how long it may stay where it is.

The training thread writes a few attributes of a `Heartbeat`; another thread reads them and
publishes a `Beat` every second or so. Imports the standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from time import perf_counter

PHASES = (
    "start",
    "data",
    "forward",
    "backward",
    "optimizer",
    "validation",
    "checkpoint",
    "end of epoch",
    "end",
)
"""Where a rank can be. ``data`` is all between two batches, ``backward`` lasts until the optimizer
steps, and ``forward`` is a ``training_step`` until its first backward pass."""
START, DATA, FORWARD, BACKWARD, OPTIMIZER, VALIDATION, CHECKPOINT, EPOCH_END, END = range(9)

SLOW_PHASES = (
    *("start", "validation", "checkpoint", "end of epoch", "end"),
    *("compiling", "search"),
)
"""Phases in which a rank may stay for longer."""

FIRST_BATCHES = 2
"""Batches in which kernels are chosen and compiled, and in which a rank may stay for longer."""


class Heartbeat:
    """Where the training thread of this rank is. Written by that thread, read by another.

    >>> heart = Heartbeat()
    >>> heart.begin_batch()
    >>> heart.enter(BACKWARD)
    >>> heart.batches, heart.events, PHASES[heart.phase]
    (1, 1, 'backward')
    """

    __slots__ = ("_since", "batches", "events", "longest", "message", "phase", "state", "totals")

    def __init__(self) -> None:
        self.phase = START
        self.batches = 0
        """Training batches begun in this fit."""
        self.events = 0
        """Changes of the phase since the batch began, and batches of a validation."""
        self.state = "running"
        """``running``, ``raised`` or ``ended``: how the fit ended, if it did."""
        self.message = ""
        """The exception, if one has ended the fit."""
        self.totals = [0.0] * len(PHASES)
        """Seconds spent in each phase."""
        self.longest = [0.0] * len(PHASES)
        """Longest stay in each phase, in seconds."""
        self._since = perf_counter()

    def enter(self, phase: int) -> None:
        """Leaves the current phase for another, or for the same one once more."""
        now = perf_counter()
        spent, left = now - self._since, self.phase
        self.totals[left] += spent
        if spent > self.longest[left]:
            self.longest[left] = spent
        self.phase = phase
        self._since = now
        self.events += 1

    def begin_batch(self) -> None:
        """Enters the forward pass of the next training batch."""
        self.enter(FORWARD)
        self.batches += 1
        self.events = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """What changes whenever the training thread gets on."""
        return self.batches, self.events, self.phase


@dataclass(frozen=True)
class Beat:
    """One publication of a rank."""

    number: int = 0
    """Counts the publications; 0 before the first."""
    phase: str = "start"
    """One of `PHASES`, ``compiling``, or ``search`` while a tuner uses the Trainer."""
    batches: int = 0
    events: int = 0
    step: int = 0
    """Optimizer steps taken."""
    idle: float = 0.0
    """Seconds since the training thread last got on."""
    allowed: float = 0.0
    """Seconds for which it may stay where it is."""
    waits: str = ""
    """The collective that the training thread waits in, where that is known."""
    state: str = "running"
    message: str = ""
    host_state: str = "running"
    """State of rank 0, whose store all use, as this rank last read it."""
    closed: bool = False
    """Whether this is the last beat: the rank does not use the store any more."""
    totals: list[float] = field(default_factory=list)

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank has come; the larger the further."""
        return self.batches, self.events

    @property
    def over(self) -> bool:
        """Whether the fit of this rank has ended, by an exception or not."""
        return self.state != "running"

    @property
    def slow(self) -> bool:
        """Whether it is where work may take long."""
        return self.phase in SLOW_PHASES or self.batches <= FIRST_BATCHES

    @property
    def place(self) -> str:
        """Where the rank is, as text.

        >>> Beat(phase="data", batches=12, step=12).place
        'in data, after batch 12 (step 12)'
        """
        if self.phase in ("start", "search"):
            return {"start": "before its first batch", "search": "in a search of a tuner"}[
                self.phase
            ]
        within = self.phase in ("forward", "backward", "optimizer", "compiling")
        where = f"in {self.phase}, {'of' if within else 'after'} batch {self.batches}"
        return f"{where} (step {self.step})" + (f", waiting in {self.waits}" * bool(self.waits))

    def to_text(self) -> str:
        """Returns the beat as text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Beat:
        """Returns what `to_text` was called on; the empty beat for an empty text."""
        return cls(**json.loads(text)) if text else cls()


def allowed_seconds(heart: Heartbeat, beat: Beat, timeout: float, slow_factor: float) -> float:
    """Returns for how long a rank may stay where it is.

    A rank that is known to wait for others has no work of its own that could be slow.

    Args:
        heart: of the rank.
        beat: about to be published, with its phase and what it waits in.
        timeout: seconds allowed in an ordinary phase.
        slow_factor: multiplies them where work may take long; a phase may also last this many
            times longer than it ever did, up to the same bound.
    """
    if beat.waits:
        return timeout
    slow = slow_factor * timeout
    if beat.slow:
        return slow
    return min(slow, max(timeout, slow_factor * heart.longest[heart.phase]))
