"""What two ranks run where one has less memory for snapshots, or copies them more slowly."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lit_stability import AutoRollback, stability_callbacks
from lit_stability.callbacks.auto_rollback import snapshot_store
from lit_stability.faults import CorruptWeight, FaultInjector
from lit_stability.trainer_internals import TrainingSnapshot
from tests.delayed import Unordered, delay_copies
from tests.rank_cases import Lines, fit_rank, incidents_of, whole


class Snapshots(Callback):
    """Records, after each batch, which snapshots there are and where they are kept."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        store = trainer.callbacks[-2]._executor._engine._store
        confirmed = store.rotation.confirmed
        self.seen.append((store.homes.of, None if confirmed is None else confirmed.step))


class WritesOnRank1(Callback):
    """Writes a weight with its own value on one rank, as the snapshot of step 20 is copied."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 20 and trainer.global_rank == 1:
            with torch.no_grad():
                weight = pl_module.net[0].weight
                weight = weight.to_local() if hasattr(weight, "to_local") else weight
                weight.add_(0.0)


def nothing(patch):
    """Both ranks have all the memory they want."""


def little_on_rank_1(patch):
    """Rank 1 has the memory for one snapshot."""
    free = 6000 if dist.get_rank() == 1 else 10**9
    patch.setattr(snapshot_store, "free_on_host", lambda sharers: free)


def none_on_rank_1(patch):
    """Rank 1 has no memory for a snapshot with the optimizer's moments."""
    free = 0 if dist.get_rank() == 1 else 10**9
    patch.setattr(snapshot_store, "free_on_host", lambda sharers: free)


def fails_on_rank_1(patch):
    """The second capture of rank 1 finds no memory."""
    count, capture = iter(range(1000)), TrainingSnapshot.capture

    def limited(self, *args, **options):
        if next(count) == 1 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        capture(self, *args, **options)

    patch.setattr(TrainingSnapshot, "capture", limited)


def slow_on_rank_1(patch):
    """Copies of rank 1 take their time."""
    delay_copies(patch, longest=0.05 if dist.get_rank() == 1 else 0.0)


def torn_on_rank_1(patch):
    """No step of rank 1 waits for its copies."""
    if dist.get_rank() == 1:
        delay_copies(patch, Unordered, shortest=0.3, longest=0.3)
    else:
        delay_copies(patch)


CASES = {
    "plenty": (nothing, 35, {}),
    "little on rank 1": (little_on_rank_1, 35, {}),
    "none on rank 1": (none_on_rank_1, None, {}),
    "fails on rank 1": (fails_on_rank_1, 35, {}),
    "slow on rank 1": (slow_on_rank_1, 35, {}),
    "written on rank 1": (slow_on_rank_1, 35, {"writes": True}),
    "not awaited on rank 1": (torn_on_rank_1, 35, {}),
    "budget": (nothing, 35, {"budget": 17_500}),
}


def memory_outcome(root, name, prepare, fault, writes=False, budget=None):
    """Snapshots, incidents and weights of one rank, for a damaged weight at some step."""
    suite, seen, lines = stability_callbacks(), Snapshots(), Lines()
    suite[-1] = AutoRollback(memory_budget=budget)
    damage = CorruptWeight(step=fault or 0, parameter="net.0.weight")
    before = [FaultInjector([damage])] if fault is not None else []
    callbacks = [*before, *([WritesOnRank1()] if writes else []), *suite, seen]
    with pytest.MonkeyPatch.context() as patch:
        # The group of the ranks is there once the strategy is set up.
        callbacks.insert(0, Prepared(prepare, patch))
        net, _ = fit_rank(root, name, callbacks)
    return {
        "incidents": incidents_of(suite),
        "seen": seen.seen,
        "weights": whole(net.parameters()),
        "log": lines.stop(),
    }


class Prepared(Callback):
    """Prepares a rank before the suite starts."""

    def __init__(self, prepare, patch):
        self._prepare, self._patch = prepare, patch

    def on_fit_start(self, trainer, pl_module):
        self._prepare(self._patch)


def memory_outcomes(root, name):
    """What a rank tells of all cases, and of a run without the suite."""
    bare, _ = fit_rank(root / "bare", name, [])
    found = {
        case: memory_outcome(root / case.replace(" ", "-"), name, prepare, fault, **options)
        for case, (prepare, fault, options) in CASES.items()
    }
    return {"bare": whole(bare.parameters()), **found}
