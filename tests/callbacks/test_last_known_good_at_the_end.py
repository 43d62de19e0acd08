"""`LastKnownGood` at the end of a fit: a short run leaves a trained checkpoint, however it ends."""

import contextlib

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from torch.utils.data import DataLoader

from lit_stability import AutoRollback, GradientMonitor, LastKnownGood, find_last_good
from lit_stability.callbacks.last_known_good import checkpoint_manager
from lit_stability.training_state.good_checkpoints import RunEnd, good_files, step_of
from tests.callbacks.test_last_known_good import Join
from tests.conftest import Regression, fit, make_trainer, regression_data

END = 47
"""Optimizer steps after which the fits end; the newest confirmed snapshot is of step 30 then."""


def suite(*extra, **options):
    """The order of the default suite, where a rollback has ended before this callback is called."""
    options = {"lr_factor_after_crash": 1} | options
    rollback = AutoRollback(snapshot_every=15, snapshot_cost=None)
    return [*extra, GradientMonitor(), rollback, LastKnownGood(**options)]


class EndsAt(Callback):
    """Raises in a hook of a step."""

    def __init__(self, hook, kind=RuntimeError, step=END):
        self.step, self.kind = step, kind
        setattr(self, hook, self._end)

    def _end(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step:
            raise self.kind("on purpose")


class Stops(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= END


class FailsInStep(Regression):
    """Raises in the optimizer, after a weight was damaged."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if self.trainer.global_step == END:
            self.net[0].weight.data.zero_()
            raise RuntimeError("on purpose")


ENDS = {
    "finished": ([], Regression, {"max_steps": END}),
    "finished with an epoch": ([], Regression, {"max_steps": -1, "max_epochs": 4}),
    "stopped early": ([Stops], Regression, {}),
    "Ctrl-C": ([lambda: EndsAt("on_train_batch_start", KeyboardInterrupt)], Regression, {}),
    "exception after backward": ([lambda: EndsAt("on_after_backward")], Regression, {}),
    "exception in a step": ([], FailsInStep, {}),
}

DATA = {
    "one epoch": regression_data,
    "shuffled epochs of 11 batches": lambda: DataLoader(
        regression_data(batches=11).dataset, 16, shuffle=True
    ),
    "epochs of one batch": lambda: regression_data(batches=1),
    "a generator of its own": lambda: DataLoader(
        regression_data(batches=25).dataset,
        16,
        shuffle=True,
        generator=torch.Generator().manual_seed(5),
    ),
}


def until_end(root, callbacks, module, data, **options):
    """Returns the module as the fit has left it, with its gradients."""
    seed_everything(0, verbose=False)
    trainer, net = make_trainer(root, callbacks, **options), module()
    with contextlib.suppress(RuntimeError, SystemExit):
        trainer.fit(net, data)
    return net


def state_of(net):
    gradients = {f"grad of {n}": p.grad for n, p in net.named_parameters()}
    return {**net.state_dict(), **{n: g for n, g in gradients.items() if g is not None}}


def differences(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("end", "data"),
    [
        ("finished", "shuffled epochs of 11 batches"),
        ("finished with an epoch", "shuffled epochs of 11 batches"),
        ("exception after backward", "epochs of one batch"),
        ("stopped early", "a generator of its own"),
        ("Ctrl-C", "one epoch"),
        ("exception after backward", "shuffled epochs of 11 batches"),
        ("exception in a step", "one epoch"),
    ],
)
def test_short_run_leaves_a_trained_checkpoint_from_which_it_goes_on_exactly(end, data, tmp_path):
    others, module, options = ENDS[end]
    bare = until_end(tmp_path / "bare", [o() for o in others], module, DATA[data](), **options)
    net = until_end(
        tmp_path / "run", suite(*[o() for o in others]), module, DATA[data](), **options
    )
    assert differences(state_of(bare), state_of(net)) == [], "the fit is left as it was"

    good = find_last_good(tmp_path / "run")
    assert step_of(good) == 30
    whole, _ = fit(tmp_path / "whole", suite(), data=DATA[data]())
    resumed = Regression()
    trainer = make_trainer(tmp_path / "run", suite())
    trainer.fit(resumed, DATA[data](), ckpt_path=good)
    assert differences(whole.state_dict(), resumed.state_dict()) == []
    assert resumed.losses == whole.losses[30:]


def test_run_that_the_suite_stops_leaves_the_state_that_it_went_back_to(tmp_path):
    class Damaged(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step >= 38:
                self.net[0].weight.data[0, 0] = torch.nan

    net = until_end(tmp_path, suite(), Damaged, regression_data())
    assert RunEnd.read(tmp_path / "good").reason.startswith("TrainingStopped")
    file = find_last_good(tmp_path)
    assert step_of(file) in (15, 30)
    saved = torch.load(file, weights_only=True)
    assert saved["global_step"] == step_of(file)
    assert all(torch.isfinite(w).all() for w in saved["state_dict"].values())
    assert all(torch.isfinite(w).all() for w in net.state_dict().values())


def test_run_without_a_trained_state_writes_no_second_file(tmp_path):
    until_end(tmp_path, suite(EndsAt("on_after_backward", step=14)), Regression, regression_data())
    assert [step_of(f) for f in good_files(tmp_path / "good")] == [0]


def test_copy_is_due_by_time_too(tmp_path, monkeypatch):
    """A run of slow steps is not kept every 500 of them."""

    class Clock(Callback):
        now = 0.0

        def on_train_batch_end(self, *args):
            self.now += 60.0

    clock = Clock()
    monkeypatch.setattr(checkpoint_manager.time, "monotonic", lambda: clock.now)
    callbacks = [GradientMonitor(), LastKnownGood(confirm_after=2, keep=9), clock, Join()]
    fit(tmp_path, callbacks, max_steps=22)
    assert [step_of(f) for f in good_files(tmp_path / "good")] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_time_must_be_positive(seconds):
    with pytest.raises(ValueError, match="every_n_seconds must be a positive number or None, got"):
        LastKnownGood(every_n_seconds=seconds)


@pytest.mark.parametrize("permanent", [True, False])
def test_fit_in_which_weights_are_pruned_is_unchanged(permanent, tmp_path):
    """The module has other parameters and buffers at its end than in the last snapshot."""
    states = []
    for name in ("suite", "bare"):
        pruning = ModelPruning("l1_unstructured", amount=0.2, make_pruning_permanent=permanent)
        callbacks = suite(pruning) if name == "suite" else [pruning]
        net, _ = fit(tmp_path / name, callbacks, max_steps=-1, max_epochs=2)
        states.append(net.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
