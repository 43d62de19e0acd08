"""The suite in every Trainer by an environment variable, as Lightning itself finds it."""

import logging
import sys
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_stability import AutoRollback, GradientMonitor, stability_callbacks
from lit_stability.cli.fit import check_options
from lit_stability.cli.fit import make_trainer as launched
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, make_trainer, regression_data
from tests.project import PYPROJECT

SUITE = [type(c).__name__ for c in stability_callbacks()]


@pytest.fixture(autouse=True)
def _installed(tmp_path_factory, monkeypatch):
    """The entry point found once, whatever is installed here: under the package's own name."""
    points = PYPROJECT["project"]["entry-points"]
    (group,) = [name for name in points if name == "lightning.pytorch.callbacks_factory"]
    info = tmp_path_factory.mktemp("site") / "lit_stability-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lit-stability\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points[group].items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    monkeypatch.setattr(sys, "path", [str(info.parent), *sys.path])


def names(trainer):
    return [type(c).__name__ for c in trainer.callbacks]


@pytest.mark.parametrize("value", [None, "", "0"])
def test_trainer_is_given_nothing_unless_asked(value, tmp_path, monkeypatch):
    if value is not None:
        monkeypatch.setenv("LIT_STABILITY_AUTO", value)
    assert names(make_trainer(tmp_path)) == []


@pytest.mark.parametrize("value", ["yes", "true", "2"])
def test_value_that_means_nothing_is_refused_with_what_to_write(value, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_STABILITY_AUTO", value)
    with pytest.raises(ValueError, match=f"got '{value}'; set LIT_STABILITY_AUTO=1, or unset"):
        make_trainer(tmp_path)


def test_trainer_without_a_suite_is_rescued_by_the_one_that_is_added(tmp_path, monkeypatch):
    """Before the callbacks that write checkpoints, once, in a second fit too."""
    monkeypatch.setenv("LIT_STABILITY_AUTO", "1")
    faults = FaultInjector([NanLoss(step=20)])
    trainer = make_trainer(tmp_path, [faults], max_steps=40, enable_checkpointing=True)
    trainer.fit(Regression(), regression_data())
    assert names(trainer) == ["FaultInjector", "AutomaticSuite", *SUITE, "ModelCheckpoint"]
    monitor = next(c for c in trainer.callbacks if isinstance(c, GradientMonitor))
    assert [i.outcome for i in monitor.incidents] == ["recovered"]
    trainer.fit_loop.epoch_loop.max_steps = 50
    trainer.fit(Regression(), regression_data())
    assert names(trainer).count("AutoRollback") == 1


def test_trainer_with_callbacks_of_the_suite_is_left_as_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LIT_STABILITY_AUTO", "1")
    trainer = make_trainer(tmp_path, [GradientMonitor(), AutoRollback()], max_steps=3)
    with caplog.at_level(logging.INFO, "lightning.pytorch.lit_stability"):
        trainer.fit(Regression(), regression_data())
    assert names(trainer) == ["GradientMonitor", "AutoRollback", "AutomaticSuite"]
    assert "adds nothing: the Trainer has GradientMonitor, AutoRollback" in caplog.text


def test_suite_of_the_module_is_not_doubled(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_STABILITY_AUTO", "1")

    class Guarded(Regression):
        def configure_callbacks(self):
            return stability_callbacks()

    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(Guarded(), regression_data())
    assert names(trainer) == ["AutomaticSuite", *SUITE]


def test_config_says_all_that_runs(tmp_path, monkeypatch):
    """What a config describes does not depend on a variable of the machine it runs on."""
    monkeypatch.setenv("LIT_STABILITY_AUTO", "1")
    model = {"_target_": "tests.conftest.Regression"}
    plain = {"experiment": "mine", "run_dir": str(tmp_path), "model": model}
    plain["trainer"] = {"accelerator": "cpu", "enable_checkpointing": False, "logger": False}
    del plain["trainer"]["logger"]
    assert "AutomaticSuite" not in names(launched(check_options(plain)))


class NoOptimizer(Regression):
    """Legal in Lightning: nearest neighbours, memory banks, dry runs."""

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()

    def configure_optimizers(self):
        return None


class ForeignTensor(Regression):
    """Optimizes a tensor that is no parameter of the module."""

    def __init__(self):
        super().__init__()
        self.__dict__["tensor"] = torch.zeros(8, requires_grad=True)

    def training_step(self, batch, batch_idx):
        return ((batch[0] - self.tensor) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.tensor], 0.1)


class Sharded(torch.optim.SGD):
    """Like an optimizer that shards its state over the ranks."""

    def consolidate_state_dict(self, to=0):
        raise NotImplementedError


class ShardedState(Regression):
    def configure_optimizers(self):
        return Sharded(self.parameters(), 0.01)


class OtherStrategy(SingleDeviceStrategy):
    """A subclass that nobody has tried with the suite."""


LEGAL = {
    "no optimizer": (NoOptimizer, {}, "returned no optimizer"),
    "a tensor of its own": (ForeignTensor, {}, "holds no parameter of ForeignTensor"),
    "sharded state": (ShardedState, {}, "cannot restore the state of a Sharded"),
    "a strategy": (
        Regression,
        {"strategy": OtherStrategy("cpu"), "accelerator": "auto"},
        "not support OtherStrategy",
    ),
}


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None")
@pytest.mark.parametrize(("module", "options", "reason"), LEGAL.values(), ids=LEGAL)
def test_fit_that_the_suite_cannot_protect_is_left_alone_with_one_line(
    module, options, reason, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("LIT_STABILITY_AUTO", "1")
    trainer = make_trainer(tmp_path, max_epochs=1, max_steps=-1, **options)
    trained = module()
    trainer.fit(trained, regression_data())
    assert names(trainer) == ["AutomaticSuite"]
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("lit_stability")]
    assert len(lines) == 1
    assert reason in lines[0]
    assert not list(tmp_path.rglob("*.*"))
    assert "setup_data" not in vars(trainer.fit_loop)

    explicit = make_trainer(tmp_path, stability_callbacks(), max_epochs=1, **options)
    refused = module in (ShardedState, Regression)
    with pytest.raises(RuntimeError, match=reason) if refused else nullcontext():
        explicit.fit(module(), regression_data())


def test_trainer_that_was_left_alone_has_the_suite_in_its_next_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_STABILITY_AUTO", "1")
    trainer = make_trainer(tmp_path, max_epochs=1, max_steps=-1)
    trainer.fit(ForeignTensor(), regression_data())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Regression(), regression_data())
    assert names(trainer) == ["AutomaticSuite", *SUITE]
