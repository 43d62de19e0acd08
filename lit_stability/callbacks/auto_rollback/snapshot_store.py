"""Keeps the snapshots of a fit where they fit, and copies them while training goes on.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from lit_stability.trainer_internals import TrainingSnapshot
from lit_stability.training_state.copies import Copies, copies_to_host
from lit_stability.training_state.free_memory import free_on_device, free_on_host
from lit_stability.training_state.out_of_memory import is_out_of_memory
from lit_stability.training_state.snapshot_memory import (
    TIERS,
    UNLIMITED,
    Homes,
    Memory,
    Needs,
    Where,
    choose_homes,
    tiers_for,
)
from lit_stability.training_state.snapshot_rotation import SnapshotRotation
from lit_stability.training_state.step_barrier import StepBarrier

Gather: TypeAlias = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    """Returns the values of all ranks, where there is one rank."""
    return [value]


class SnapshotStore:
    """The two snapshots of a fit, or the one that there is memory for.

    When the first snapshot is captured, nobody knows yet what a step needs; on an accelerator it is
    kept in the memory of the host, and where it does not fit, it is captured after the first step.
    With the second one, when optimizer and activations have their memory, it is decided where all
    are kept from then on. With a budget that is decided again for each snapshot, as the state of
    the optimizers may grow.

    Copies to the host run beside the next forward and backward pass: an optimizer's update comes
    after them. In automatic optimization these passes are the closure that an optimizer's step
    calls, so the step waits at the end of the closure. A parameter that is written before, by the
    program, may be torn in the copy. Its version counter shows that, or `program_wrote` tells it,
    and the snapshot is discarded instead of confirmed. Where that happens twice, as under an
    optimizer that moves the weights before it calls its closure, training waits for the copies
    from then on.

    Ranks must have the same snapshots. So all know what each needs and has when they decide, a
    capture for which one rank has no memory is given up by all, and a snapshot that is torn on one
    rank is discarded by all. That takes one exchange on the host for each capture, and another
    before a copy on the host is confirmed. No other step waits for another rank.

    Args:
        make: returns a snapshot without content.
        confirm_after: healthy steps after which a snapshot is confirmed.
        where: where the user wants snapshots.
        device: of the weights.
        budget: bytes that snapshots and what comes beside them may take; None for no bound.
        gather: returns a value of each rank, in their order; all ranks call it at the same place.
        sharers: ranks on this machine, which share its memory.
    """

    def __init__(
        self,
        make: Callable[[], TrainingSnapshot],
        *,
        confirm_after: int,
        where: Where,
        device: torch.device,
        budget: int | None = None,
        gather: Gather = alone,
        sharers: int = 1,
    ) -> None:
        self.rotation = SnapshotRotation(make, confirm_after)
        self._make, self._confirm_after = make, confirm_after
        self._device, self._where, self._budget = device, where, budget
        self._gather, self._sharers = gather, sharers
        self._at_once, self._to_host = Copies(), copies_to_host(device)
        self._numbers: dict[int, int] = {}
        """Number of each snapshot, by its id, in the order in which they were first captured."""
        self._on_accelerator = device.type != "cpu"
        self._tiers = tiers_for(where, on_accelerator=self._on_accelerator)
        self._decided = where != "auto"
        """Whether it is known what a step needs, or the user has decided."""
        self.homes = Homes(self._tiers[0])
        """Where the snapshots are kept, as far as that is known."""
        if self._on_accelerator and not self._decided:
            self.homes = Homes(("host", "host"), "a step has yet to show what it needs")
        self._barrier = StepBarrier(self._to_host, beside_passes=True)
        self._torn = False
        """Whether the program wrote weights while the candidate was copied."""
        self._times_torn = 0

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Has the steps of these optimizers come after the copies."""
        self._barrier.follow(optimizers)

    def close(self) -> None:
        """Waits for copies, and removes the hooks of the optimizers."""
        self._barrier.close()

    def capture(
        self,
        needs: Callable[[], Needs],
        take: Callable[[TrainingSnapshot], None],
        *,
        confirm: bool,
        stepped: bool,
    ) -> None:
        """Captures a snapshot, if there is memory for one.

        Args:
            needs: returns what the suite needs now, in bytes.
            take: copies the present state into a snapshot.
            confirm: whether it is good without further steps, as the first one is.
            stepped: whether a step has shown what it needs; until then a snapshot for which there
                is no memory may be captured later.
        """
        if not self._has_memory(needs, stepped):
            return
        while not self.keeps_none and not self._fits(take):
            if not stepped:
                return
            self._give_up_some()
        if self.keeps_none:
            self.rotation = SnapshotRotation(self._make, self._confirm_after)
            return
        confirm = confirm or self.rotation.single
        if confirm or self._times_torn > 1:
            self._barrier.finish()
        if confirm:
            self.rotation.confirm_now()

    def capture_present(self, take: Callable[[TrainingSnapshot], None]) -> TrainingSnapshot | None:
        """Captures the present state at the end of a fit, where the candidate would be.

        Returns:
            The complete snapshot; None where there is no memory for a second one.
        """
        if self.keeps_none or self.rotation.single or not self._fits(take):
            return None
        self._barrier.finish()
        return self.rotation.candidate

    def _has_memory(self, needs: Callable[[], Needs], stepped: bool) -> bool:
        """Decides, together with all ranks, where snapshots are kept.

        Returns:
            False if there is no memory for the first snapshot now.
        """
        if self._decided and self._budget is None:
            return True
        ranks = self._gather((needs(), self._memory()))
        if not stepped:
            return bool(choose_homes(ranks, (self.homes.of[:1], ())).of)
        found = choose_homes(ranks, self._tiers)
        if not self._decided or found.of != self.homes.of:
            self.homes = found
        self._decided, self._tiers = True, self._tiers[self._tiers.index(found.of) :]
        return True

    def _memory(self) -> Memory:
        """Returns what is free on this rank if the snapshots that it holds are not counted."""
        if self._where != "auto":  # the user knows; only the budget counts
            return Memory(UNLIMITED if self._on_accelerator else None, UNLIMITED, self._budget)
        held = {"device": 0, "host": 0}
        for snapshot in self.rotation.all:
            on_host = not self._on_accelerator or self._copies_of(snapshot) is self._to_host
            held["host" if on_host else "device"] += snapshot.nbytes
        device, host = free_on_device(self._device), free_on_host(self._sharers)
        on_device = None if device is None else device + held["device"]
        return Memory(on_device, host + held["host"], self._budget)

    def _fits(self, take: Callable[[TrainingSnapshot], None]) -> bool:
        """Captures, and returns whether all ranks had the memory for it."""
        self.rotation.single = len(self.homes.of) == 1
        snapshot = self.rotation.begin()
        copies = self._copies_of(snapshot)
        snapshot.place(copies)
        captured = True
        try:
            take(snapshot)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            captured = False
        if not all(self._gather(captured)):
            self._to_host.finish()
            self.rotation.discard()
            return False
        self._torn = False
        if copies is self._to_host:
            self._barrier.begin(
                written=lambda: snapshot.written, torn=lambda: self._has_torn(snapshot)
            )
        return True

    def _has_torn(self, snapshot: TrainingSnapshot) -> None:
        """Notes that the candidate may be torn, which all ranks then discard."""
        self._torn = self._torn or snapshot is self.rotation.candidate

    def _copies_of(self, snapshot: TrainingSnapshot) -> Copies:
        number = self._numbers.setdefault(id(snapshot), len(self._numbers))
        place = self.homes.of[min(number, len(self.homes.of) - 1)]
        return self._at_once if place == "device" else self._to_host

    def _give_up_some(self) -> None:
        """Asks for less memory after an allocation has failed."""
        places = {"device", "host"} if self._on_accelerator else {self.homes.of[0]}
        below = TIERS[TIERS.index(self.homes.of) + 1 :]
        self._tiers = tuple(tier for tier in below if set(tier) <= places)
        self._decided = True
        self.homes = Homes(self._tiers[0], "an allocation failed")

    @property
    def keeps_none(self) -> bool:
        """Whether there is no memory for any snapshot."""
        return not self.homes.of

    def finish(self) -> None:
        """Waits until the copies are complete."""
        self._barrier.finish()

    @property
    def is_copying(self) -> bool:
        """Whether a snapshot is copied beside the present step."""
        return self._barrier.is_copying

    def program_wrote(self) -> None:
        """Notes that the program wrote weights other than in an optimizer's step."""
        self._torn = self._torn or self._barrier.is_copying

    def wait(self) -> None:
        """Has writes to the weights that come now come after the copies."""
        self._to_host.wait()

    def healthy(self) -> None:
        """Counts a healthy step; a snapshot that it confirms is complete, on all ranks."""
        candidate = self.rotation.candidate
        if candidate is not None and self.rotation.is_about_to_confirm:
            self._barrier.finish()  # no optimizer may have stepped: a scaler skips steps
            beside_training = self._copies_of(candidate) is self._to_host
            if beside_training and any(self._gather(self._torn)):
                self._times_torn += 1
                self.rotation.discard()
        self.rotation.healthy()
