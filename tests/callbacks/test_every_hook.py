"""Every hook of every public callback, at every time: no order of calls may end or change a run."""

import inspect
import random

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lit_stability import CrashPrediction, Preflight, stability_callbacks
from lit_stability.callbacks.hooks import HOOKS
from lit_stability.detectors import Anomaly
from lit_stability.faults import CorruptWeight, FaultInjector
from lit_stability.incidents import Incident
from lit_stability.measurement.step_stats import StepStats
from tests.callbacks.test_battery import CHANGES_A_HEALTHY_RUN, PUBLIC, bare_fit, suite_with
from tests.conftest import Regression, fit, flat, make_trainer, regression_data

OF_LIGHTNING = [
    name
    for name, value in vars(Callback).items()
    if inspect.isfunction(value) and not name.startswith("_")
]
LIGHTNING = [
    name
    for name, value in vars(Callback).items()
    if inspect.isfunction(value) and not name.startswith("_")
]
ON_PURPOSE = {"lower_learning_rate", "on_restart"}
"""Hooks that change the next fit, as their names say."""
EVERY = [name for name in (*LIGHTNING, *HOOKS) if name not in ON_PURPOSE]
STARTS = "on_train_start"
STAGES = ("fit", "validate", "test", "predict")


@pytest.fixture(params=PUBLIC, ids=lambda c: c.__name__)
def cls(request):
    return request.param


def arguments(callback, trainer, module):
    """A plausible value for every parameter that a hook of Lightning or of this package has."""
    anomaly = Anomaly(kind="non-finite loss", step=3, value=1.0, signal="loss", message="nan")
    stats = StepStats(step=3, loss=1.0, grad_norm=1.0)
    incident = Incident(1, anomaly, epoch=0)
    incident.stats = stats
    return {
        "trainer": trainer,
        "pl_module": module,
        "batch": (torch.randn(4, 8), torch.randn(4)),
        "batch_idx": 0,
        "dataloader_idx": 0,
        "outputs": torch.tensor(1.0),
        "loss": torch.tensor(1.0),
        "optimizer": torch.optim.SGD(module.parameters(), 0.1),
        "exception": RuntimeError("of the user"),
        "checkpoint": {"callbacks": {callback.state_key: callback.state_dict()}},
        "stats": stats,
        "anomaly": anomaly,
        "incident": incident,
        "micro_batches": 2,
        "flags": [0.0, 0.0],
    }


OWN_STATE = {
    "load_state_dict": "state_dict",
    "rescale_batch_counts": "state_dict",
    "load_rewindable_state": "rewindable_state",
    "load_consensus_state": "consensus_state",
}
"""Hooks that are given a state, and the one that returns it."""


def call(callback, name, trainer, module):
    """Calls one hook, with every stage if it takes one; reads a flag."""
    hook = getattr(callback, name)
    if not callable(hook):
        return
    values = arguments(callback, trainer, module)
    if name in OWN_STATE:
        values["state"] = values["state_dict"] = getattr(callback, OWN_STATE[name])() or {}
    parameters = inspect.signature(hook).parameters
    for stage in STAGES if "stage" in parameters else STAGES[:1]:
        hook(*((values | {"stage": stage})[p] for p in parameters))


def call_all(callback, trainer, module, seed):
    """Calls every hook but the one that starts a fit, in a random order."""
    names = [name for name in EVERY if name != STARTS]
    random.Random(seed).shuffle(names)
    for name in names:
        call(callback, name, trainer, module)


def unused(tmp_path, callbacks):
    """A Trainer that has not run yet, and a module that belongs to it."""
    trainer, module = make_trainer(tmp_path, callbacks), Regression()
    trainer.strategy.connect(module)
    return trainer, module


def test_hook_called_alone_outside_of_a_fit_raises_nothing(cls, tmp_path):
    for name in EVERY:
        callbacks = suite_with(cls)
        trainer, module = unused(tmp_path, callbacks)
        call(callbacks[-1], name, trainer, module)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.each_value
@pytest.mark.parametrize("seed", range(3))
def test_hooks_called_in_any_order_before_and_between_fits_change_no_fit(cls, seed, tmp_path):
    callbacks = suite_with(cls)
    call_all(callbacks[-1], *unused(tmp_path / "unused", callbacks), seed)
    for turn in range(2):
        module, trainer = fit(tmp_path / "with", callbacks, max_steps=12)
        bare, _ = bare_fit(max_steps=12)
        assert trainer.global_step == 12
        if cls.__name__ not in CHANGES_A_HEALTHY_RUN:
            assert torch.equal(flat(module), flat(bare)), turn
        assert callbacks[0].incidents == []
        call_all(callbacks[-1], trainer, module, seed)
    assert not list((tmp_path / "unused").rglob("*"))


def test_hooks_called_in_any_order_after_a_failed_fit_change_no_fit(cls, tmp_path):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("of the user")
            return super().training_step(batch, batch_idx)

    callbacks = suite_with(cls)
    trainer, module = make_trainer(tmp_path, callbacks), Failing()
    with pytest.raises(RuntimeError, match="of the user"):
        trainer.fit(module, regression_data())
    call_all(callbacks[-1], trainer, module, 0)
    module, _ = fit(tmp_path / "with", callbacks, max_steps=12)
    bare, _ = bare_fit(max_steps=12)
    if cls.__name__ not in CHANGES_A_HEALTHY_RUN:
        assert torch.equal(flat(module), flat(bare))


@pytest.mark.each_value
@pytest.mark.parametrize("fn", ["validate", "test", "predict"])
def test_callback_in_an_evaluation_and_a_checkpoint_saved_after_it(cls, fn, tmp_path):
    """A Trainer that never fits, and one that has fitted."""

    class Evaluated(Regression):
        def test_step(self, batch, batch_idx):
            self.log("test/loss", self.net(batch[0]).mean())

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    callbacks = suite_with(cls)
    trainer, module = make_trainer(tmp_path, callbacks, max_steps=12), Evaluated()
    for when in ("before", "after"):
        getattr(trainer, fn)(module, regression_data(4))
        trainer.save_checkpoint(tmp_path / f"{when}.ckpt")
        trainer.fit(module, regression_data(), regression_data(4))
        trainer.fit_loop.epoch_loop.max_steps += 12
    assert trainer.global_step == 24
    state = torch.load(tmp_path / "before.ckpt", weights_only=True)["state_dict"]
    assert all(t.isfinite().all() for t in state.values())


class Tuned(Regression):
    """What the tuner needs: a learning rate and a batch size to choose."""

    def __init__(self):
        super().__init__(optimizer="sgd", dropout=0.5)
        self.lr, self.batch_size = 1e-2, 8

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    def train_dataloader(self):
        data = regression_data(20).dataset
        return DataLoader(data, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return regression_data(4)


class FinderBeforeSomeEpochs(LearningRateFinder):
    """As Lightning's documentation has it: looks for a rate again at given epochs."""

    def on_fit_start(self, trainer, pl_module):
        return

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in (0, 2):
            self.lr_find(trainer, pl_module)


SWEEP = {"min_lr": 1e-5, "max_lr": 10.0}
TUNING = {
    "lr_find": lambda trainer, module: Tuner(trainer).lr_find(module, num_training=30, **SWEEP),
    "scale_batch_size": lambda trainer, module: Tuner(trainer).scale_batch_size(
        module, max_trials=2, steps_per_trial=3
    ),
    "binsearch": lambda trainer, module: Tuner(trainer).scale_batch_size(
        module, mode="binsearch", max_trials=2, steps_per_trial=3
    ),
}
FINDERS = {
    "LearningRateFinder": lambda: LearningRateFinder(num_training_steps=30, **SWEEP),
    "BatchSizeFinder": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=3),
    "at epochs": lambda: FinderBeforeSomeEpochs(num_training_steps=20, min_lr=1e-4, max_lr=1e-2),
}


def tuned(root, callbacks, tune):
    """What a tuner finds, and the weights of the fit after it."""
    seed_everything(0, verbose=False)
    options = {"max_steps": -1, "max_epochs": 3, "num_sanity_val_steps": 0}
    trainer, module = make_trainer(root, callbacks, **options), Tuned()
    found = tune(trainer, module)
    trainer.fit(module)
    results = getattr(found, "results", found)
    return results, module.lr, module.batch_size, trainer.global_step, flat(module)


def assert_equal(first, second):
    assert first[:-1] == second[:-1]
    assert torch.equal(first[-1], second[-1])


def files(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "tune",
    [
        pytest.param(tune, marks=[pytest.mark.long] if name == "binsearch" else [], id=name)
        for name, tune in TUNING.items()
    ],
)
def test_tuner_with_the_suite_finds_what_it_finds_without_it(tune, tmp_path):
    bare = tuned(tmp_path / "bare", [], tune)
    suite = stability_callbacks()
    assert_equal(tuned(tmp_path / "suite", suite, tune), bare)
    assert suite[0].incidents == []


@pytest.mark.parametrize("tune", TUNING.values(), ids=TUNING)
def test_tuner_with_the_suite_leaves_no_file(tune, tmp_path):
    tune(make_trainer(tmp_path, stability_callbacks()), Tuned())
    assert files(tmp_path) == []


@pytest.mark.parametrize("order", ["before", pytest.param("after", marks=pytest.mark.long)])
@pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
def test_finder_beside_the_suite_finds_what_it_finds_without_it(finder, order, tmp_path):
    def nothing(trainer, module):
        return None

    bare = tuned(tmp_path / "bare", [finder()], nothing)
    suite, one = stability_callbacks(), finder()
    callbacks = [one, *suite] if order == "before" else [*suite, one]
    assert_equal(tuned(tmp_path / "suite", callbacks, nothing), bare)
    assert suite[0].incidents == []


@pytest.mark.parametrize("order", ["before", "after"])
def test_rollback_after_a_search_in_the_fit_is_exact(order, tmp_path):
    """The weights are damaged in the first steps after the finder has run."""

    def nothing(trainer, module):
        return None

    bare = tuned(tmp_path / "bare", [FINDERS["at epochs"]()], nothing)
    suite, finder = stability_callbacks(), FINDERS["at epochs"]()
    faults = FaultInjector([CorruptWeight(step=3, parameter="net.0.weight")])
    callbacks = [finder, faults, *suite] if order == "before" else [faults, *suite, finder]
    assert_equal(tuned(tmp_path / "suite", callbacks, nothing), bare)
    assert [i.outcome for i in suite[0].incidents] == ["recovered"]
    assert not [name for name in files(tmp_path / "suite") if "lr_find" in name]


PLACES = [
    *("prepare_data", "setup", "configure_optimizers", "on_fit_start", "train_dataloader"),
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "training_step"),
    *("on_before_zero_grad", "on_before_backward", "on_before_optimizer_step"),
    *("on_train_batch_end", "validation_step", "on_train_epoch_end", "on_save_checkpoint"),
]


CHECKPOINT_AS_PLANNED = pytest.mark.filterwarnings("ignore:.*ckpt_path")
"""Of `OnExceptionCheckpoint`, at the start of any fit."""


@CHECKPOINT_AS_PLANNED
@pytest.mark.parametrize("place", PLACES)
def test_error_of_the_user_is_the_error_that_is_raised(place, tmp_path):
    """Whatever had begun, and with callbacks that save a checkpoint because of the error."""

    class Failing(Tuned):
        batch_size = 32

    def fail(self, *args, **kwargs):
        raise ZeroDivisionError(f"in {place}")

    setattr(Failing, place, fail)
    extra = [ModelCheckpoint(tmp_path / "best", save_on_exception=True)]
    if place != "on_save_checkpoint":
        extra.append(OnExceptionCheckpoint(tmp_path / "last"))
    suite = [*stability_callbacks(), CrashPrediction(), Preflight()]
    trainer = make_trainer(
        tmp_path, [*suite, *extra], max_epochs=1, max_steps=-1, enable_checkpointing=True
    )
    with pytest.raises(ZeroDivisionError, match=f"in {place}"):
        trainer.fit(Failing())


@CHECKPOINT_AS_PLANNED
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_exception"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_error_of_another_callback_is_the_error_that_is_raised(hook, order, tmp_path):
    class Failing(Callback):
        pass

    def fail(self, *args, **kwargs):
        raise ZeroDivisionError(f"in {hook}")

    setattr(Failing, hook, fail)
    if hook == "on_exception":
        Failing.on_train_start = fail
    suite = stability_callbacks()
    callbacks = [Failing(), *suite] if order == "before" else [*suite, Failing()]
    with pytest.raises(ZeroDivisionError, match=f"in {hook}"):
        fit(
            tmp_path,
            [*callbacks, OnExceptionCheckpoint(tmp_path)],
            enable_checkpointing=True,
        )
