"""The hooks of this package: a base class that is called, foreign ones too, misspelt ones named."""

import copy
import inspect
import logging

import pytest
from lightning.pytorch import Callback

from lit_stability import AutoRollback, GradientMonitor, StabilityCallback, stability_callbacks
from lit_stability.callbacks.hooks import (
    HOOKS,
    implements,
    lower_learning_rate,
    misspelt_hooks,
)
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit, make_trainer, regression_data

SEEN = ("on_step_measured", "on_healthy_step", "on_incident", "on_incident_closed")


def recording(*bases):
    """A class that notes which hooks were called, and on which step."""

    class Recorder(*bases):
        def __init__(self):
            super().__init__()
            self.calls = []

    for name in SEEN:

        def hook(self, trainer, pl_module, *args, name=name):
            self.calls.append((name, trainer.global_step))

        setattr(Recorder, name, hook)
    return Recorder


class Owner:
    """What has no hook of its own."""


class Delegate(Callback):
    """Stands in for another callback, whose attributes it finds."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)


def kind(base, **members):
    return type("Pager", (base,), {"__module__": "stranger", **members})()


def hook(self, *args): ...


@pytest.mark.parametrize("base", [StabilityCallback, Callback])
def test_hook_of_any_callback_is_called_once_per_step(base, tmp_path):
    recorder = recording(base)()
    fit(tmp_path, [FaultInjector([NanLoss(step=9)]), GradientMonitor(), recorder], max_steps=30)
    calls = {name: [step for n, step in recorder.calls if n == name] for name in SEEN}
    assert calls["on_step_measured"] == list(range(30))
    assert calls["on_incident"][0] == 9
    assert 9 not in calls["on_healthy_step"]
    assert calls["on_healthy_step"][:9] == list(range(9))
    assert len(calls["on_incident_closed"]) == 1


def test_hook_of_a_module_is_called_after_those_of_the_callbacks(tmp_path):
    order = []

    class Module(Regression):
        def on_incident(self, trainer, pl_module, incident):
            order.append(("module", incident.resolved))

    class Last(StabilityCallback):
        def on_incident(self, trainer, pl_module, incident):
            order.append(("callback", incident.resolved))

    callbacks = [FaultInjector([NanLoss(step=9)]), GradientMonitor(), AutoRollback(), Last()]
    fit(tmp_path, callbacks, Module, max_steps=20)
    assert order[:2] == [("callback", True), ("module", True)]


def test_callbacks_of_the_suite_derive_from_the_base_class():
    assert all(isinstance(each, StabilityCallback) for each in stability_callbacks())


def test_every_hook_of_the_base_class_says_when_it_is_called():
    for name in HOOKS:
        member = inspect.getattr_static(StabilityCallback, name)
        if inspect.isfunction(member):
            assert (inspect.getdoc(member) or "").startswith(
                ("Called", "Returns", "Takes", "Ask", "Restores")
            ), name


def test_override_of_the_suite_has_the_parameters_of_the_hook():
    """A hook that is called with other arguments than its override takes fails at step 12,431."""
    for callback in stability_callbacks():
        for name in HOOKS:
            own = getattr(type(callback), name)
            if inspect.isfunction(own):
                expected = inspect.signature(getattr(StabilityCallback, name)).parameters
                assert list(inspect.signature(own).parameters) == list(expected), (callback, name)


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (StabilityCallback(), "on_incident", False),
        (GradientMonitor(), "on_incident", False),
        (AutoRollback(), "on_incident", True),
        (AutoRollback(), "can_roll_back", True),
        (GradientMonitor(), "can_roll_back", False),
        (kind(Callback, on_incident=hook), "on_incident", True),
        (kind(Callback), "on_incident", False),
        (Owner(), "rewindable_state", False),
        (Delegate(AutoRollback()), "on_incident", True),
        (Delegate(Callback()), "on_incident", False),
        (kind(Callback, on_incident=None), "on_incident", False),
    ],
)
def test_implements_tells_an_override_from_the_empty_hook(owner, name, expected):
    assert implements(owner, name) is expected


@pytest.mark.parametrize(
    ("base", "name", "meant"),
    [
        (Callback, "on_incidents", "on_incident"),
        (Callback, "on_incident_close", "on_incident_closed"),
        (Callback, "on_healthy_steps", "on_healthy_step"),
        (Callback, "on_roll_back", "on_rollback"),
        (Callback, "rewindable_states", "rewindable_state"),
        (Callback, "on_suspicion", "on_local_anomaly"),
        (Callback, "on_new_regime", "on_regime_change"),
        (Callback, "load_books", "load_consensus_state"),
        (Callback, "can_restore", "can_roll_back"),
        (Regression, "on_incidents", "on_incident"),
        # Hooks of Lightning, hooks of this package, and other people's names.
        (Callback, "on_incident", None),
        (Callback, "on_train_batch_end", None),
        (Callback, "on_before_zero_grad", None),
        (Callback, "on_step_end", None),
        (Callback, "on_event", None),
        (Callback, "state_dict", None),
        (Callback, "_on_incidents", None),
        (Callback, "lower_learning_rates", None),
        (Regression, "books", None),
        (Regression, "on_step", None),
    ],
)
def test_misspelt_hook_is_found_with_the_name_that_was_meant(base, name, meant):
    assert misspelt_hooks(kind(base, **{name: hook})) == ({} if meant is None else {name: meant})


def test_misspelt_flag_is_found():
    assert misspelt_hooks(kind(Callback, need_recorded_step=True)) == {
        "need_recorded_step": "needs_recorded_step"
    }


def test_misspelt_hook_is_reported_once_when_the_fit_starts(tmp_path, caplog):
    pager = kind(Callback, on_incidents=hook)
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        fit(tmp_path, [GradientMonitor(), pager], max_steps=5)
    lines = [r.getMessage() for r in caplog.records if "never called" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("[stability] Pager.on_incidents is never called")
    assert "on_incident was probably meant" in lines[0]


def test_ordinary_method_of_a_stranger_is_not_taken_for_a_hook(tmp_path):
    """Somebody's own `lower_learning_rate` takes other arguments, and is none of our business."""

    class Own(Callback):
        def lower_learning_rate(self, trainer, group, factor): ...

    trainer = make_trainer(tmp_path, [GradientMonitor(), Own()])
    assert not lower_learning_rate(trainer, 0.5)
    rollback = AutoRollback()
    trainer = make_trainer(tmp_path, [GradientMonitor(), Own(), rollback])
    assert lower_learning_rate(trainer, 0.5)
    assert rollback.backoff.lr_factor == 0.5


def test_suite_and_plain_module_have_no_misspelt_hook(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        fit(tmp_path, stability_callbacks(), max_steps=5)
    assert not [r for r in caplog.records if "never called" in r.getMessage()]


def test_hook_of_a_callback_that_another_one_stands_in_for_is_called(tmp_path):
    inner = kind(Callback, on_healthy_step=lambda *args: seen.append(args[-1].step))
    seen = []
    fit(tmp_path, [GradientMonitor(), Delegate(inner)], max_steps=3)
    assert seen == [0, 1, 2]


class Watching(StabilityCallback):
    """Defines one of the hooks of a batch."""

    def __init__(self):
        self.batches, self.copies, self.hidden = 0, [], []

    def on_after_backward(self, trainer, pl_module):
        self.batches += 1

    def on_train_batch_end(self, trainer, *args):
        self.hidden += [n for n in vars(self) if n.startswith("on_")]
        self.copies = [copy.deepcopy(each) for each in trainer.callbacks]


def test_empty_hooks_are_not_called_in_a_fit_and_are_there_again_afterwards(tmp_path):
    watching = Watching()
    without = kind(Callback)
    without.on_before_zero_grad = None
    suite = [*stability_callbacks(), watching]
    fit(tmp_path, [*suite, without], max_steps=5)
    assert watching.batches == 5
    assert "on_before_zero_grad" in watching.hidden
    assert not {"on_after_backward", "on_train_batch_end"} & {*watching.hidden}
    assert without.on_before_zero_grad is None, "what a user has set stays"
    for each in [*suite, *watching.copies[: len(suite)]]:
        assert callable(each.on_before_zero_grad), each
        assert callable(each.on_after_backward), each


def test_empty_hooks_are_there_again_after_a_fit_that_failed(tmp_path):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            raise KeyError("no such column")

    trainer = make_trainer(tmp_path, stability_callbacks())
    with pytest.raises(KeyError):
        trainer.fit(Fails(), regression_data())
    assert all(callable(each.on_before_zero_grad) for each in trainer.callbacks)
