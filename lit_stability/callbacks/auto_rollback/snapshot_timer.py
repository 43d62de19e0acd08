"""Measures what snapshots cost, and has all ranks agree on how often they are taken.

May import Lightning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lit_stability.policies.snapshot_cadence import SnapshotCadence

clock = time.perf_counter
"""Monotonic clock, in seconds."""


class SnapshotTimer:
    """Measures steps and captures on the clock of the training loop.

    A capture that is measured is waited for, with the work of the device before it: what the device
    does beside the host would not show otherwise. These are three captures, then three of as many
    as were taken before, and so on. A copy that runs beside a step costs as much as it is longer
    than a step.

    Args:
        cadence: decides the distance between snapshots.
        device: of the weights.
        finish: waits until the copies of a capture are complete.
        gather: returns a value of each rank, in their order; all ranks call it at the same place.
    """

    def __init__(
        self,
        cadence: SnapshotCadence,
        device: torch.device,
        finish: Callable[[], None],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.cadence = cadence
        self._device, self._finish, self._gather = device, finish, gather
        self._began: float | None = None

    def step_ended(self) -> None:
        """Records the duration of the step that has ended, before a snapshot is taken."""
        if self._began is not None:
            self.cadence.stepped(clock() - self._began)
        self._began = None

    def step_begins(self) -> None:
        """Starts the clock of the next step, after the snapshot."""
        self._began = clock()

    def take(self, capture: Callable[[], None], room: Callable[[], float]) -> bool:
        """Takes a snapshot; decides the distance to the next ones if that is due.

        Args:
            capture: captures it.
            room: returns the largest distance for which this rank has memory.

        Returns:
            Whether the distance has changed.
        """
        if self.cadence.measures:
            self.cadence.captured(self._measured(capture))
        else:
            capture()
            self.cadence.captured(None)
        if not self.cadence.decides:
            return False
        return self.cadence.agree(self._gather((self.cadence.wanted(), room())))

    def _measured(self, capture: Callable[[], None]) -> float:
        """Captures a snapshot, and returns for how many seconds that holds training up."""
        self._synchronize()
        began = clock()
        capture()
        self._synchronize()
        captured = clock()
        self._finish()
        beside = clock() - captured
        return captured - began + max(0.0, beside - self.cadence.step_seconds)

    def _synchronize(self) -> None:
        """Waits for the work in the order of the device, but not for copies beside it."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        elif self._device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize()
