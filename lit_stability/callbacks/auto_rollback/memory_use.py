"""Knows what the snapshots and what comes beside them take in memory, and states it.

May import Lightning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lit_stability.callbacks.auto_rollback.snapshot_store import SnapshotStore
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals import (
    ReplayRing,
    callbacks_of,
    incident_bytes,
    run_directory,
    snapshot_bytes,
)
from lit_stability.training_state.byte_sizes import as_text
from lit_stability.training_state.frozen_weights import FrozenWeights
from lit_stability.training_state.good_checkpoints import find_last_good
from lit_stability.training_state.snapshot_memory import Needs

_ONE_SNAPSHOT = "damage that is found only after the next one was taken cannot be undone"
_TOO_MANY_BATCHES = "the batches are more: they are not replayed after a rollback"
_NO_SNAPSHOT = (
    "a bad step is undone and its batch left out, but damaged weights end the fit; it can be "
    "resumed from a checkpoint of LastKnownGood, if there is one"
)


class MemoryUse:
    """What `AutoRollback` takes in memory on this rank: bytes, where they are, and their bound.

    Args:
        trainer: in its fit.
        pl_module: the module in training.
        store: keeps the snapshots.
        ring: keeps the batches to replay.
        frozen: the one copy of the frozen weights.
        budget: bytes that all of it may take; None if only the free memory bounds it.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        store: SnapshotStore,
        ring: ReplayRing,
        frozen: FrozenWeights,
        budget: int | None,
    ) -> None:
        self._trainer, self._module = trainer, pl_module
        self._store, self._ring, self._frozen = store, ring, frozen
        self._budget, self._max_replay_bytes = budget, ring.max_bytes
        self._batches: int | None = None
        """Bytes of the batches since the older of two snapshots, once that is known."""
        self._stated: object = None

    def needs(self) -> Needs:
        """Returns what the suite needs now, to decide where the snapshots are kept."""
        return Needs(
            snapshot=max(self._newest_bytes, snapshot_bytes(self._trainer, self._module)),
            frozen=self._frozen.nbytes,
            batches=min(self._max_replay_bytes, self._batches or 0),
            batches_held=self._ring.nbytes,
            incident=incident_bytes(self._module, reruns=self._reruns),
        )

    @property
    def _newest_bytes(self) -> int:
        rotation = self._store.rotation
        newest = rotation.candidate or rotation.confirmed
        return 0 if newest is None else newest.nbytes

    @property
    def _reruns(self) -> bool:
        """Whether a callback runs the step of an incident again."""
        return any(getattr(c, "needs_recorded_step", False) for c in callbacks_of(self._trainer))

    def measure_batches(self) -> None:
        """Measures the batches since the first snapshot, when the second is about to be taken.

        Two such spans are kept later. What is known then holds for the whole fit, so that no
        snapshot is given up for batches that a bound leaves out.
        """
        confirmed, ring = self._store.rotation.confirmed, self._ring
        if self._batches is None and confirmed is not None:
            since = ring.since(max(confirmed.position, ring.first))
            self._batches = 2 * sum(entry.nbytes for entry in since)

    def bound_batches(self) -> None:
        """Has the batches take no more than what the budget leaves beside the snapshots."""
        if self._budget is None:
            return
        needs = self.needs()
        planned = 1 if self._batches is None else len(self._store.homes.of)
        taken = max(planned, len(self._store.rotation.all)) * needs.snapshot + needs.beside
        self._ring.bound(max(0, min(self._max_replay_bytes, self._budget - taken)))

    @property
    def bound_on_batches(self) -> str:
        """The bound on the batches, with the argument that sets it."""
        if self._ring.max_bytes < self._max_replay_bytes:
            return f"the {self._ring.max_bytes} bytes that memory_budget={self._budget} leaves"
        return f"max_replay_bytes={self._max_replay_bytes}"

    def startup_text(self) -> str:
        """Returns the snapshots, where they are and their size, before the first step."""
        # The optimizers get their state in the first step.
        stepped = any(optimizer.state for optimizer in self._trainer.optimizers)
        more = "" if stepped else " and the optimizer state"
        return f"{replace(self._store.homes, reason='')}{self._sizes()}{more}"

    def news(self) -> str | None:
        """Returns a line about snapshots that are fewer, or elsewhere, than there is memory for.

        It is stated before the first step, and again when the state of the optimizers and the
        batches are known.
        """
        homes, known = self._store.homes, self._batches is not None
        if not self._newest_bytes and homes.of:
            return None  # the first snapshot is still to come
        if self._stated == (homes, known) or not (homes.reason or self._lost()):
            return None
        self._stated = (homes, known)
        parts = [f"AutoRollback keeps {homes}{self._sizes()}"]
        if known and homes.of:
            parts.append(
                f"{len(self._ring.entries)} batches to replay, {as_text(self._ring.nbytes)} of "
                f"at most {as_text(self._ring.max_bytes)}"
            )
        return "; ".join([*parts, *filter(None, [self._lost()])])

    def _sizes(self) -> str:
        frozen = self._frozen.nbytes
        each = f", {as_text(self._newest_bytes)} each" if self._store.homes.of else ""
        return each + (f", and {as_text(frozen)} of frozen weights once" if frozen else "")

    def _lost(self) -> str:
        """Returns what cannot be done for want of memory."""
        snapshots = len(self._store.homes.of)
        lost = [{0: _NO_SNAPSHOT, 1: _ONE_SNAPSHOT}.get(snapshots, "")]
        if snapshots * (self._batches or 0) > 2 * self._ring.max_bytes:
            lost.append(_TOO_MANY_BATCHES)
        return "; ".join(filter(None, lost))

    def where_to_resume(self) -> str:
        """Returns what a fit without a snapshot can go on from, for the message of its end."""
        directory = run_directory(self._trainer)
        file = None if directory is None else find_last_good(directory)
        if file is None:
            return "no good checkpoint is on disk either; LastKnownGood keeps one"
        return f"resume from the last good checkpoint, {file}, or use fit_with_recovery"

    def as_dict(self) -> dict[str, Any]:
        """Returns the memory as JSON types, for the record of an incident."""
        homes = self._store.homes
        return {
            "snapshots": len(homes.of),
            "places": list(homes.of),
            "snapshot_bytes": self._newest_bytes,
            "frozen_bytes": self._frozen.nbytes,
            "batch_bytes": self._ring.nbytes,
            "max_batch_bytes": self._ring.max_bytes,
            "incident_bytes": incident_bytes(self._module, reruns=self._reruns),
            "memory_budget": self._budget,
            "reason": homes.reason,
            "lost": self._lost(),
        }
