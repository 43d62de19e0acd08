"""State that a program keeps itself: what is undone with a step, and what is logged about it."""

import logging
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch.nn.utils.parametrizations import weight_norm

from lit_stability import AutoRollback, GradientMonitor, TrainingStopped, read_incidents
from lit_stability.callbacks.auto_rollback import rollback_engine
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import fit
from tests.exact import Batches, loader
from tests.exact_net import Net
from tests.exact_practices import ByHand, Codebook, Curriculum, Teacher


def suite(*faults, **options):
    injector = [FaultInjector(list(faults))] if faults else []
    return [*injector, GradientMonitor(), AutoRollback(**options)]


def train(root, module=Net, *faults, callbacks=(), nan=(), **options):
    options = {"max_epochs": 3, "max_steps": -1, **options}
    return fit(root, [*suite(*faults), *callbacks], module, loader(Batches(nan=nan)), **options)


@pytest.mark.parametrize(
    "kind", ["parameter", "written through data", "trained", "buffer"], ids=lambda k: k.split()[0]
)
def test_nan_batch_that_a_codebook_takes_in_is_the_only_one_left_out(kind, tmp_path):
    """A bad batch that damages a weight in its own step is suspected itself."""
    module, trainer = train(tmp_path, lambda: Codebook(kind), nan=(10,), max_epochs=1)
    assert trainer.global_step == 23
    assert module.codes.isfinite().all()
    (incident,) = read_incidents(tmp_path)
    assert sum(r.startswith("rolled back") for r in incident["responses"]) <= 2


@pytest.mark.parametrize("step", [40, 42, 48])
def test_damage_in_the_second_of_two_optimizers_is_rolled_back_at_once(step, tmp_path):
    """The first optimizer's finding, a NaN loss, would only have the step retried."""
    fault = CorruptWeight(step=step, parameter="last.1.weight")
    module, _ = train(tmp_path, ByHand, fault, max_epochs=2)
    assert all(p.isfinite().all() for p in module.parameters())
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"][-1] == "rolled back and replayed"
    assert incident["outcome"] == "recovered"


def test_link_to_the_last_checkpoint_is_not_left_without_its_file(tmp_path):
    fault = CorruptWeight(step=45, steps=10**9, parameter="first.0.weight")
    checkpoint = ModelCheckpoint(
        tmp_path / "c", every_n_train_steps=3, save_top_k=-1, filename="{step}", save_last="link"
    )
    with pytest.raises(TrainingStopped):
        train(tmp_path, Net, fault, callbacks=[checkpoint], enable_checkpointing=True)
    links = [file for file in (tmp_path / "c").iterdir() if file.is_symlink()]
    assert links
    assert all(link.exists() for link in links)


def test_written_parameters_are_reported_once(tmp_path, caplog):
    train(tmp_path, Teacher, NanLoss(step=10), NanLoss(step=30), max_epochs=2)
    text = "the program writes slow.weight, slow.bias itself, in a hook after the update"
    assert caplog.text.count(text) == 1


class Projects(Net):
    def on_train_epoch_end(self):
        with torch.no_grad():
            self.first[0].weight.clamp_(-0.3, 0.3)


@pytest.mark.parametrize("module", [Net, Projects])
def test_writes_between_two_steps_are_not_copied_with_each_step(module, tmp_path, caplog):
    """Averages that are swapped in for a validation, and a projection after each epoch."""
    average = EMAWeightAveraging(decay=0.9)
    callbacks = [*suite(NanLoss(step=30)), average]
    val = loader(Batches(2))
    fit(
        tmp_path,
        callbacks,
        module,
        loader(Batches()),
        val,
        max_steps=60,
        val_check_interval=8,
        max_epochs=-1,
    )
    assert "itself" not in caplog.text


@dataclass
class Saves(Callback):
    """Has a state that can be read only while a checkpoint is saved; a dataclass has no hash."""

    saving: bool = False

    def state_dict(self):
        if not self.saving:
            raise RuntimeError("no checkpoint is saved now")
        return {}

    def load_state_dict(self, state_dict):
        pass


def test_state_of_a_callback_that_cannot_be_read_is_logged_once(tmp_path, caplog):
    fault = CorruptWeight(step=30, parameter="first.0.weight")
    module, trainer = train(tmp_path, Net, fault, callbacks=[Saves()], max_epochs=2)
    assert (trainer.global_step, module.first[0].weight.isfinite().all()) == (48, True)
    assert caplog.text.count("the state of Saves is not rolled back: RuntimeError") == 1


def replace_the_optimizer(module):
    module.trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), 1e-2)]


class ReplacesBetweenEpochs(Net):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            replace_the_optimizer(self)


class ReplacesInABatch(Net):
    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 30:
            replace_the_optimizer(self)


class ReplacesAWeightToo(Net):
    """The parameter of ``weight_norm`` is an alias of the weight that it takes the place of."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            weight_norm(self.first[0])
            replace_the_optimizer(self)


@pytest.mark.parametrize("kind", [ReplacesBetweenEpochs, ReplacesInABatch, ReplacesAWeightToo])
def test_steps_of_an_optimizer_that_was_replaced_are_no_writes(kind, tmp_path, caplog):
    module, _ = train(tmp_path, kind, NanLoss(step=40))
    assert "itself" not in caplog.text
    assert all(p.isfinite().all() for p in module.parameters())


def test_weights_written_before_the_first_step_are_not_copied_with_each_step(tmp_path, caplog):
    """Weights that a learning rate finder restores, or that are loaded late."""

    class Loads(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 0:
                self.load_state_dict(self.state_dict())

    train(tmp_path, Loads, max_epochs=1)
    assert "itself" not in caplog.text


def test_place_in_the_step_of_a_write_is_named(tmp_path, caplog):
    train(tmp_path, Codebook, NanLoss(step=10), max_epochs=1)
    assert "the program writes codes itself, in training_step" in caplog.text


def test_weights_that_are_too_large_to_be_copied_each_step_are_undone_by_a_snapshot(
    tmp_path, monkeypatch
):
    runs = []
    for limit in (2**26, 1):
        monkeypatch.setattr(rollback_engine, "_COPIED", limit)
        module, _ = train(tmp_path / str(limit), Teacher, nan=(10,), max_epochs=2)
        runs.append(module.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    records = [read_incidents(tmp_path / str(limit))[0]["responses"] for limit in (2**26, 1)]
    assert records == [["step retried", "step skipped"]] * 2


class Counts(Callback):
    """Keeps a number that nothing saves."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1


def test_attributes_of_callbacks_that_stay_are_reported_once(tmp_path, caplog):
    faults = [CorruptWeight(step=s, parameter="first.0.weight") for s in (20, 50)]
    train(tmp_path, Net, *faults, callbacks=[Counts(), Curriculum()])
    lines = [r.getMessage() for r in caplog.records if "not rolled back" in r.getMessage()]
    assert len(lines) == 1
    assert "Counts.batches" in lines[0]
    assert "Curriculum" not in lines[0], "it has a state_dict, so it is rolled back"


class CannotLoad(Curriculum):
    def load_state_dict(self, state_dict):
        raise RuntimeError("only when a checkpoint is loaded")


def test_callback_that_cannot_load_its_state_does_not_end_the_fit(tmp_path, caplog):
    faults = [NanLoss(step=10), CorruptWeight(step=20, parameter="first.0.weight")]
    _, trainer = train(tmp_path, Net, *faults, callbacks=[CannotLoad()], max_epochs=2)
    assert trainer.global_step == 48
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.getMessage().split(": ")[0] for r in warned] == [
        "[stability] the state of CannotLoad is not rolled back"
    ]


@pytest.mark.parametrize("kind", ["flag", "counter"])
def test_step_that_fails_by_an_attribute_of_the_module_goes_on_with_another_value(kind, tmp_path):
    """The step fails whatever its batch, as long as the attribute is restored."""

    class Fails(Net):
        failed, calls = False, 0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.calls += 1
            if kind == "counter":
                return loss * float("nan") if self.calls == 13 else loss
            if self.trainer.global_step != 12 or self.failed:
                return loss
            self.failed = True
            return loss * float("nan")

    module, trainer = train(tmp_path, Fails, max_epochs=1)
    assert trainer.global_step >= 23
    assert all(p.isfinite().all() for p in module.parameters())
    (incident,) = read_incidents(tmp_path)
    assert incident["outcome"] == "recovered"


def test_unfrozen_layer_is_frozen_by_a_rollback_and_unfrozen_by_the_replay(tmp_path):
    class Unfreezes(Callback):
        done = False

        def __init__(self):
            self.seen = []

        def setup(self, trainer, pl_module, stage):
            pl_module.first.requires_grad_(False)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 26 and not self.done:
                self.done = True
                pl_module.first.requires_grad_(True)
            self.seen.append((trainer.global_step, pl_module.first[0].weight.requires_grad))

    callback, fault = Unfreezes(), CorruptWeight(step=28, parameter="last.1.weight")
    train(tmp_path, Net, fault, callbacks=[callback], max_epochs=2)
    assert callback.seen.count((25, False)) == 2, "the steps before it were replayed"
    assert set(callback.seen) == {(step, step >= 26) for step in range(48)}
