"""Copies that run beside training: what a rollback restores is one moment, never a mixture."""

import functools

import pytest
import torch

from lit_stability import AutoRollback, GradientMonitor, stability_callbacks
from lit_stability.faults import CorruptMoment, CorruptWeight, FaultInjector, NanLoss
from tests.delayed import Unordered, delay_copies
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net
from tests.exact_practices import Codebook, RestartsCodes
from tests.test_exact_recovery import TwoOptimizers

FAULTS = {
    "damaged weight": functools.partial(CorruptWeight, parameter="first.0.weight"),
    "damaged moment": CorruptMoment,
    "NaN loss": NanLoss,
}
NETS = {
    "AdamW": Net,
    "fused AdamW": functools.partial(Net, "fused AdamW"),
    "two optimizers": TwoOptimizers,
    "codebook": lambda: Codebook("trained"),
    "restarted codes": RestartsCodes,
}


def pair(root, net, fault, suite=lambda: [GradientMonitor(), AutoRollback()], **options):
    """A clean run, and one with a fault."""
    options = {"max_epochs": 3, **options}
    clean = run(root / "clean", net, loader(Batches()), **options)
    callbacks = [FaultInjector([fault(step=45)]), *suite()]
    saved = run(root / "saved", net, loader(Batches()), callbacks, **options)
    assert callbacks[1].incidents, "the fault was seen"
    return clean, saved


CELLS = [(net, fault) for net in NETS for fault in FAULTS]
CELLS.remove(
    ("two optimizers", "NaN loss")
)  # in manual optimization a fault of the loss is no fault


@pytest.mark.parametrize(("net", "fault"), CELLS)
def test_rollback_to_a_copy_that_took_its_time_is_exact(net, fault, tmp_path, monkeypatch):
    delay_copies(monkeypatch)
    clean, saved = pair(tmp_path, NETS[net], FAULTS[fault])
    assert differences(clean, saved) == {}


def test_healthy_run_with_such_copies_is_unchanged(tmp_path, monkeypatch):
    delay_copies(monkeypatch)
    bare = run(tmp_path / "bare", Net, loader(Batches()), max_epochs=3)
    suite = run(tmp_path / "suite", Net, loader(Batches()), stability_callbacks(), max_epochs=3)
    assert differences(bare, suite) == {}


def test_copies_that_no_step_waits_for_are_torn(tmp_path, monkeypatch):
    """What the waits are for; the delays are longer than a step on a busy machine."""
    delay_copies(monkeypatch, Unordered, shortest=0.3, longest=0.3)
    clean, saved = pair(tmp_path, Net, FAULTS["damaged weight"])
    assert "weights" in differences(clean, saved)


class WritesBeforeTheUpdate(Net):
    """Adds to a weight in each step from the tenth on, in the hook before the optimizer's step."""

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step >= 10:
            with torch.no_grad():
                self.last[1].bias.add_(1e-3)


def test_snapshot_of_weights_that_the_program_wrote_meanwhile_is_not_used(tmp_path, monkeypatch):
    delay_copies(monkeypatch)
    clean, saved = pair(tmp_path, WritesBeforeTheUpdate, FAULTS["damaged weight"])
    assert differences(clean, saved) == {}
