"""Where snapshots are kept: by the memory that is free, and after an allocation that failed."""

import logging
import subprocess
import sys
import textwrap

import pytest
import torch

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    LastKnownGood,
    TrainingStopped,
    fit_with_recovery,
)
from lit_stability.callbacks.auto_rollback import snapshot_store
from lit_stability.callbacks.auto_rollback.snapshot_store import SnapshotStore
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from lit_stability.trainer_internals import TrainingSnapshot
from lit_stability.training_state.copies import Copies, HostCopies
from lit_stability.training_state.snapshot_memory import Needs
from tests.conftest import Regression, fit, regression_data
from tests.conftest import make_trainer as make
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net


class Recorded:
    """A snapshot that notes where it was placed."""

    def __init__(self):
        self.copies = []
        self.written, self.nbytes = False, 0

    def place(self, copies):
        self.copies.append(copies)


def store_on_an_accelerator(monkeypatch, free, where="auto"):
    """A store for weights on a device with so many free bytes."""
    monkeypatch.setattr(snapshot_store, "free_on_device", lambda device: free)
    monkeypatch.setattr(snapshot_store, "free_on_host", lambda sharers: 100)
    return SnapshotStore(Recorded, confirm_after=1, where=where, device=torch.device("meta"))


def places_of(store, captures=5):
    """Where each of some snapshots went, each confirmed before the next."""
    found = []
    for i in range(captures):
        store.capture(
            lambda: Needs(10),
            lambda s: found.append(type(s.copies[-1])),
            confirm=i == 0,
            stepped=i > 0,
        )
        store.healthy()
    store.close()
    return found


def test_first_snapshot_is_on_the_host_until_a_step_has_shown_what_it_needs(monkeypatch):
    found = places_of(store_on_an_accelerator(monkeypatch, free=50))
    assert found == [HostCopies, *[Copies] * 4]


def test_snapshots_share_the_memories_where_the_device_holds_one(monkeypatch):
    found = places_of(store_on_an_accelerator(monkeypatch, free=15))
    assert set(found[1:3]) == {Copies, HostCopies}
    assert found[1:3] == found[3:5], "each keeps its memory"


@pytest.mark.parametrize(("where", "kind"), [("device", Copies), ("host", HostCopies)])
def test_choice_of_the_user_holds_from_the_first_snapshot_on(where, kind, monkeypatch):
    assert set(places_of(store_on_an_accelerator(monkeypatch, 0, where))) == {kind}


@pytest.mark.parametrize("value", ["gpu", None, torch.device("cpu")])
def test_unknown_memory_is_refused(value):
    with pytest.raises(ValueError, match="snapshot_device must be 'auto', 'device' or 'host', got"):
        AutoRollback(snapshot_device=value)


def fail_captures(monkeypatch, fails):
    """Has a capture find no memory where `fails` says so of its number."""
    count = iter(range(10**6))
    capture = TrainingSnapshot.capture

    def limited(self, *args, **options):
        if fails(next(count)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        capture(self, *args, **options)

    monkeypatch.setattr(TrainingSnapshot, "capture", limited)


def suite_without_a_snapshot(fault, monkeypatch):
    """Callbacks of a fit in which no snapshot ever fits."""
    fail_captures(monkeypatch, lambda i: True)
    return [FaultInjector([fault]), GradientMonitor(), AutoRollback()]


def test_allocation_that_fails_later_leaves_one_snapshot_and_the_run_goes_on(
    tmp_path, monkeypatch, caplog
):
    clean = run(tmp_path / "clean", Net, loader(Batches()), max_epochs=3)
    fail_captures(monkeypatch, lambda i: i == 1)
    caplog.set_level(logging.INFO)
    callbacks = [
        FaultInjector([CorruptWeight(step=45, parameter="first.0.weight")]),
        GradientMonitor(),
        AutoRollback(),
    ]
    saved = run(tmp_path / "saved", Net, loader(Batches()), callbacks, max_epochs=3)
    assert "AutoRollback keeps one snapshot on the device, as an allocation failed" in caplog.text
    assert callbacks[1].incidents[0].responses == ["rolled back and replayed"]
    assert differences(clean, saved) == {}


def test_bad_batch_is_left_out_without_any_snapshot(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clean = run(tmp_path / "clean", Net, loader(Batches(left_out=[9])), max_epochs=2)
    callbacks = suite_without_a_snapshot(NanLoss(step=10**6), monkeypatch)
    saved = run(tmp_path / "saved", Net, loader(Batches(nan=[9])), callbacks, max_epochs=2)
    assert differences(clean, saved) == {}
    assert "step skipped" in callbacks[1].incidents[0].responses
    assert "AutoRollback keeps no snapshot, as an allocation failed" in caplog.text


def test_damage_without_any_snapshot_stops_the_run_with_the_reason(tmp_path, monkeypatch):
    callbacks = suite_without_a_snapshot(CorruptWeight(step=30), monkeypatch)
    with pytest.raises(TrainingStopped, match="there was no memory for a snapshot to go back to"):
        fit(tmp_path, callbacks, max_steps=60)


def test_fit_without_a_snapshot_names_the_checkpoint_on_disk_to_resume_from(tmp_path, monkeypatch):
    callbacks = suite_without_a_snapshot(CorruptWeight(step=30), monkeypatch)
    callbacks.insert(2, LastKnownGood(every_n_steps=10))
    with pytest.raises(TrainingStopped, match="resume from the last good checkpoint") as stopped:
        fit(tmp_path, callbacks, max_steps=60)
    (file,) = [w.rstrip(",") for w in str(stopped.value).split() if w.endswith(".ckpt,")]
    suite = [GradientMonitor(), LastKnownGood(), AutoRollback()]
    module, trainer = Regression(), make(tmp_path / "again", suite, max_steps=60)
    trainer.fit(module, regression_data(), ckpt_path=file)
    assert trainer.global_step == 60
    assert all(p.isfinite().all() for p in module.parameters())


def test_fit_without_a_snapshot_and_without_a_checkpoint_says_so(tmp_path, monkeypatch):
    callbacks = suite_without_a_snapshot(CorruptWeight(step=30), monkeypatch)
    with pytest.raises(TrainingStopped, match="no good checkpoint is on disk either"):
        fit(tmp_path, callbacks, max_steps=60)


def test_recovery_goes_back_to_disk_where_no_snapshot_fits(tmp_path, monkeypatch):
    fail_captures(monkeypatch, lambda i: True)
    faults = [FaultInjector([CorruptWeight(step=30)])]

    def make_trainer(**overrides):
        fault = [faults.pop()] if faults else []
        suite = [GradientMonitor(), LastKnownGood(every_n_steps=10), AutoRollback()]
        return make(tmp_path, [*fault, *suite], max_steps=60, **overrides)

    module = Regression()
    result = fit_with_recovery(make_trainer, module, train_dataloaders=regression_data())
    assert len(result.crashes) == 1
    assert result.trainer.global_step == 60
    assert all(p.isfinite().all() for p in module.parameters())


LIMITED = textwrap.dedent(
    """
    import resource, sys, tempfile
    import torch
    from pathlib import Path
    from tests.conftest import Regression, make_trainer, regression_data
    from lit_stability import AutoRollback, GradientMonitor
    from lit_stability.callbacks.auto_rollback import snapshot_store
    from lit_stability.training_state.snapshot_memory import Homes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    MIB = 2**20

    class Large(Regression):
        def __init__(self):
            super().__init__("sgd")
            self.net = torch.nn.Sequential(torch.nn.Linear(8, 4096), torch.nn.Linear(4096, 4096),
                                           torch.nn.Linear(4096, 1))

    if sys.argv[1] == "two":  # whatever is free
        snapshot_store.choose_homes = lambda *_: Homes(("device", "device"))
        snapshot_store.is_out_of_memory = lambda error: False
    callbacks = [GradientMonitor(), AutoRollback()]
    make_trainer(tempfile.mkdtemp(), callbacks, max_steps=2).fit(Regression(), regression_data())
    module = Large()  # 64 MiB of weights, as many of gradients and of momentum
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + 420 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    trainer = make_trainer(tempfile.mkdtemp(), [GradientMonitor(), AutoRollback()], max_steps=60)
    trainer.fit(module, regression_data())
    print("STEPS", trainer.global_step)
    """
)


def fit_in_limited_memory(snapshots):
    """What a fit prints that may use 420 MiB beyond a small fit before it, and its error."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, snapshots],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.long
def test_run_that_two_snapshots_would_kill_keeps_one_and_goes_on():
    killed = fit_in_limited_memory("two")
    assert "can't allocate memory" in killed.stderr
    done = fit_in_limited_memory("auto")
    assert "STEPS 60" in done.stdout, done.stderr[-2000:]
    assert "AutoRollback keeps one snapshot on the device, as two do not fit into" in done.stderr
