"""Keeps the snapshots of a fit where they fit, and copies them while training goes on.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

from lit_stability.trainer_internals import TrainingSnapshot
from lit_stability.training_state.copies import Copies, copies_to_host
from lit_stability.training_state.out_of_memory import is_out_of_memory
from lit_stability.training_state.snapshot_memory import (
    Homes,
    Where,
    choose_homes,
    free_on_device,
    free_on_host,
)
from lit_stability.training_state.snapshot_rotation import SnapshotRotation
from lit_stability.training_state.step_barrier import StepBarrier


class SnapshotStore:
    """The two snapshots of a fit, or the one that there is memory for.

    When the first snapshot is captured, nobody knows yet what a step needs; on an accelerator it is
    kept in the memory of the host. With the second one, when optimizer and activations have their
    memory, it is decided where all are kept from then on.

    Copies to the host run beside the next forward and backward pass: an optimizer's step comes
    after them. A parameter that is written before that step, by the program, may be torn in the
    copy; its version counter shows that, and the snapshot is discarded.

    Ranks must have the same snapshots. So with several of them no rank decides by its own memory,
    and training waits for the copies.

    Args:
        make: returns a snapshot without content.
        confirm_after: healthy steps after which a snapshot is confirmed.
        where: where the user wants snapshots.
        device: of the weights.
        alone: whether this is the only rank.
    """

    def __init__(
        self,
        make: Callable[[], TrainingSnapshot],
        *,
        confirm_after: int,
        where: Where,
        device: torch.device,
        alone: bool = True,
    ) -> None:
        self.rotation = SnapshotRotation(make, confirm_after)
        self._make, self._confirm_after = make, confirm_after
        self._device, self._alone = device, alone
        self._at_once, self._to_host = Copies(), copies_to_host(device)
        self._numbers: dict[int, int] = {}
        """Number of each snapshot, by its id, in the order in which they were first captured."""
        self.homes: Homes | None = None
        """Where the snapshots are kept, once that is decided."""
        if where != "auto":
            self.homes = Homes((where, where))
        elif not alone:
            self.homes = Homes(("device", "device"))
        self._barrier = StepBarrier(self._to_host)

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Has the steps of these optimizers come after the copies."""
        self._barrier.follow(optimizers)

    def close(self) -> None:
        """Waits for copies, and removes the hooks of the optimizers."""
        self._barrier.close()

    def capture(
        self,
        size: Callable[[], int],
        take: Callable[[TrainingSnapshot], None],
        *,
        confirm: bool,
    ) -> None:
        """Captures a snapshot, if there is memory for one.

        Args:
            size: returns the size of a snapshot in bytes.
            take: copies the present state into a snapshot.
            confirm: whether it is good without further steps, as the first one is.
        """
        first = self.rotation.confirmed
        if self.homes is None and first is not None:
            self._decide(size(), first.nbytes)
        while not self._fits(take):
            if not self._give_up_some():
                return
        confirm = confirm or self.rotation.single
        if confirm or not self._alone:
            self._barrier.finish()
        if confirm:
            self.rotation.confirm_now()

    def _decide(self, nbytes: int, held: int) -> None:
        """Decides where snapshots are kept; ``held`` bytes of the host are those of the first."""
        free = free_on_device(self._device)
        self.homes = choose_homes(nbytes, device=free, host=free_on_host() + held)

    def _fits(self, take: Callable[[TrainingSnapshot], None]) -> bool:
        self.rotation.single = self.homes is not None and len(self.homes.of) == 1
        snapshot = self.rotation.begin()
        copies = self._copies_of(snapshot)
        snapshot.place(copies)
        try:
            take(snapshot)
        except (MemoryError, RuntimeError) as error:
            if not self._alone or not is_out_of_memory(error):
                raise
            self.rotation.discard()
            return False
        if copies is self._to_host:
            self._barrier.begin(
                written=lambda: snapshot.written, discard=lambda: self._discard(snapshot)
            )
        return True

    def _discard(self, torn: TrainingSnapshot) -> None:
        if torn is self.rotation.candidate:
            self.rotation.discard()

    def _copies_of(self, snapshot: TrainingSnapshot) -> Copies:
        number = self._numbers.setdefault(id(snapshot), len(self._numbers))
        if self.homes is None:
            return self._at_once if self._device.type == "cpu" else self._to_host
        of = self.homes.of
        return self._at_once if of[min(number, len(of) - 1)] == "device" else self._to_host

    def _give_up_some(self) -> bool:
        """Asks for less memory after an allocation has failed; returns whether that is possible."""
        of = ("device",) * 2 if self.homes is None else self.homes.of
        reason = "an allocation failed"
        if len(of) == 2 and "device" in of and self._device.type != "cpu":
            self.homes = Homes(("host", "host"), reason)
        elif len(of) != 1:
            self.homes = Homes(of[:1] or ("host",), reason)
        else:
            self.homes = Homes((), reason)
            self.rotation = SnapshotRotation(self._make, self._confirm_after)
        return bool(self.homes.of)

    @property
    def stated(self) -> Homes:
        """Where the snapshots are kept, as far as that is known."""
        if self.homes is not None:
            return self.homes
        if self._device.type == "cpu":
            return Homes(("device", "device"))
        return Homes(("host", "host"), "a step has yet to show what it needs")

    @property
    def keeps_none(self) -> bool:
        """Whether there is no memory for any snapshot."""
        return self.homes is not None and not self.homes.of

    def wait(self) -> None:
        """Has writes to the weights that come now come after the copies."""
        self._to_host.wait()

    def healthy(self) -> None:
        """Counts a healthy step; a snapshot that it confirms is complete."""
        if self.rotation.is_about_to_confirm:
            self._barrier.finish()
        self.rotation.healthy()
