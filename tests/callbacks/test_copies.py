"""Callbacks, module and Trainer are pickled and deep-copied at any time of a fit."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_stability import find_last_good, stability_callbacks
from lit_stability.faults import CorruptWeight, FaultInjector
from tests.callbacks.test_battery import CHANGES_A_HEALTHY_RUN, PUBLIC, bare_fit, suite_with
from tests.conftest import Regression, fit, flat, make_trainer, regression_data

WAYS = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "deepcopy": copy.deepcopy}


class Copies(Callback):
    """Copies all that belongs to a fit in every hook of a step, in the first steps and later."""

    def __init__(self, way):
        self.way, self.callbacks, self.modules = way, [], []

    def look(self, trainer, pl_module):
        if trainer.global_step in (0, 1, 12):
            others = [c for c in trainer.callbacks if c is not self]
            self.callbacks = self.way(others)
            self.modules.append(self.way(pl_module))
            trainer.callbacks, kept = others, trainer.callbacks
            try:
                self.way(trainer)
            finally:
                trainer.callbacks = kept


def look(self, trainer, pl_module, *args):
    self.look(trainer, pl_module)


for hook in (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_end"),
):
    setattr(Copies, hook, look)


@pytest.mark.each_value
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("cls", PUBLIC, ids=lambda c: c.__name__)
def test_copy_in_any_hook_changes_nothing_and_can_be_used(cls, way, tmp_path):
    copies = Copies(way)
    module, _ = fit(tmp_path / "copied", [*suite_with(cls), copies], max_steps=15)
    bare, _ = bare_fit(max_steps=15)
    if cls.__name__ not in CHANGES_A_HEALTHY_RUN:
        assert torch.equal(flat(module), flat(bare))
    again, trainer = fit(tmp_path / "again", copies.callbacks, max_steps=15)
    assert trainer.global_step == 15
    if cls.__name__ not in CHANGES_A_HEALTHY_RUN:
        assert torch.equal(flat(again), flat(bare))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copy_of_a_module_calls_its_own_step(way, tmp_path):
    """Also in the first steps, where one is recorded to verify a resume."""
    copies = Copies(way)
    module, _ = fit(tmp_path, [*stability_callbacks(), copies], max_steps=15)
    assert copies.modules
    assert all(each.training_step.__self__ is each for each in copies.modules)
    assert "training_step" not in vars(module)


class Keeps(Regression):
    """Keeps its callbacks among its hyperparameters, as some packages do."""

    def __init__(self, callbacks):
        super().__init__()
        self.save_hyperparameters()


def test_module_with_its_callbacks_among_its_hyperparameters_is_saved_and_resumed(tmp_path, caplog):
    suite = stability_callbacks()
    trainer = make_trainer(
        tmp_path,
        [FaultInjector([CorruptWeight(step=45)]), *suite, ModelCheckpoint(every_n_train_steps=10)],
        enable_checkpointing=True,
    )
    trainer.fit(Keeps(suite), regression_data())
    assert [i.outcome for i in suite[0].incidents] == ["recovered"]
    path = trainer.checkpoint_callback.best_model_path
    loaded = Keeps.load_from_checkpoint(path, weights_only=False)
    assert [type(c) for c in loaded.hparams.callbacks] == [type(c) for c in suite]
    assert find_last_good(tmp_path) is not None
    assert "was not written" not in caplog.text


def test_trainer_and_its_callbacks_pickle_after_a_fit_with_the_automatic_suite(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("LIT_STABILITY_AUTO", "1")
    from lit_stability.registration import callbacks

    trainer = make_trainer(tmp_path, callbacks(), max_steps=5)
    trainer.fit(Regression(), regression_data())
    assert len(pickle.loads(pickle.dumps(trainer)).callbacks) == len(trainer.callbacks)
