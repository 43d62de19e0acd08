"""Copies that run beside training: what a rollback restores is one moment, never a mixture."""

import functools

import pytest
import torch

from lit_stability import AutoRollback, GradientMonitor, stability_callbacks
from lit_stability.faults import CorruptMoment, CorruptWeight, FaultInjector, NanLoss
from tests.delayed import ThreadCopies, Unordered, delay_copies
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


@pytest.mark.each_value
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


class Adversarial(Net):
    """Trains on perturbed weights, as adversarial weight perturbation does: by way of `data`.

    No version counter shows it, and the weights are the old ones again before the update.
    """

    def training_step(self, batch, batch_idx):
        backup = {p: p.detach().clone() for p in self.parameters()}
        for p in backup:
            p.data.add_(0.01)
        loss = super().training_step(batch, batch_idx)
        for p, values in backup.items():
            p.data = values
        return loss


@pytest.mark.parametrize("net", [WritesBeforeTheUpdate, Adversarial])
def test_snapshot_of_weights_that_the_program_wrote_meanwhile_is_not_used(
    net, tmp_path, monkeypatch
):
    delay_copies(monkeypatch)
    clean, saved = pair(tmp_path, net, FAULTS["damaged weight"])
    assert differences(clean, saved) == {}


class WritesFromStep20(Net):
    """Adds to a weight in each forward pass from the step on at which the second copy is made."""

    through_data = False

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 20:
            bias = self.last[1].bias
            with torch.no_grad():
                (bias.data if self.through_data else bias).add_(1e-3)
        return super().training_step(batch, batch_idx)


class WritesThroughDataFromStep20(WritesFromStep20):
    """Does so without raising the version counter of the weight."""

    through_data = True


class MovesFirst(torch.optim.SGD):
    """Moves the weights before it calls its closure, and back afterwards, as SAM does."""

    @torch.no_grad()
    def step(self, closure):
        weights = [p for group in self.param_groups for p in group["params"]]
        for p in weights:
            p.add_(0.25)
        with torch.enable_grad():
            loss = closure()
        for p in weights:
            p.sub_(0.25)
        super().step()
        return loss


class MovedFirst(Net):
    def configure_optimizers(self):
        return MovesFirst(self.parameters(), 1e-2, momentum=0.9)


LATE = {
    "weight": WritesFromStep20,
    "weight through data": WritesThroughDataFromStep20,
    "weights before the closure": MovedFirst,
    "LBFGS": lambda: Net("LBFGS"),
}


@pytest.mark.parametrize("net", LATE)
def test_copy_that_is_torn_by_writes_before_the_update_is_never_restored(
    net, tmp_path, monkeypatch
):
    delay_copies(monkeypatch, shortest=0.1, longest=0.2)
    fault = functools.partial(CorruptWeight, parameter="first.0.weight")
    options = {"max_epochs": 2}
    clean = run(tmp_path / "clean", LATE[net], loader(Batches()), **options)
    callbacks = [FaultInjector([fault(step=35)]), GradientMonitor(), AutoRollback()]
    saved = run(tmp_path / "saved", LATE[net], loader(Batches()), callbacks, **options)
    assert callbacks[1].incidents[0].responses[0] == "rolled back and replayed"
    assert differences(clean, saved) == {}


def test_update_waits_for_the_copies_and_the_passes_before_it_do_not(tmp_path, monkeypatch):
    """The copies run beside forward and backward pass: that is what they are made so for."""
    events = []

    class Noted(ThreadCopies):
        def start(self, pairs):
            events.append("copy")
            super().start(pairs)

        def wait(self):
            events.append("wait")
            super().wait()

    class Watched(Net):
        def training_step(self, batch, batch_idx):
            events.append("forward")
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            events.append("backward")

        def optimizer_step(self, *args, **options):
            super().optimizer_step(*args, **options)
            events.append("update")

    delay_copies(monkeypatch, Noted)
    run(tmp_path, Watched, loader(Batches()), [GradientMonitor(), AutoRollback()], max_epochs=1)
    after = events[len(events) - events[::-1].index("copy") :]
    assert after[:4] == ["forward", "backward", "wait", "update"]
