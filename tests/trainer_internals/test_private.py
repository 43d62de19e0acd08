"""Loud when Lightning moves something that this package reaches into."""

import lightning
import pytest
from packaging.version import Version

from lit_stability import stability_callbacks
from lit_stability.trainer_internals import LIGHTNING_VERSIONS, PRIVATE
from tests.conftest import fit


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("fit"), stability_callbacks(), max_steps=3)[1]


@pytest.mark.parametrize("path", PRIVATE)
def test_private_attribute_relied_on_is_where_it_was(path, trainer):
    value = trainer
    for name in path.split("."):
        assert hasattr(value, name), f"lightning {lightning.__version__} has no Trainer.{path}"
        value = getattr(value, name)


def test_counters_have_the_fields_that_are_rewound(trainer):
    loop = trainer.fit_loop.epoch_loop
    for progress in (
        loop.automatic_optimization.optim_progress.optimizer.step,
        loop.manual_optimization.optim_step_progress,
        loop.scheduler_progress,
    ):
        for tracker in (progress.total, progress.current):
            assert isinstance(tracker.ready, int)
            assert isinstance(tracker.completed, int)


def test_installed_lightning_is_one_that_was_run():
    oldest, newest = map(Version, LIGHTNING_VERSIONS)
    assert oldest <= Version(lightning.__version__) <= newest, (
        "run the tests on this lightning, then widen LIGHTNING_VERSIONS"
    )
