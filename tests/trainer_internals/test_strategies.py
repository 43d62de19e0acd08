"""What is asked of a strategy."""

from datetime import timedelta

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lit_stability.trainer_internals import adapter_of


@pytest.mark.parametrize(
    ("strategy", "seconds"),
    [
        ("auto", 0.0),
        (DDPStrategy(), 0.0),
        (DDPStrategy(timeout=timedelta(minutes=5)), 0.0),
        (DDPStrategy(timeout=timedelta(hours=2)), 7200.0),
        (ModelParallelStrategy(1, 1, timeout=timedelta(hours=2)), 7200.0),
    ],
    ids=["one device", "default", "shorter", "longer", "longer, sharded"],
)
def test_longest_wait_is_what_the_user_allows_beyond_the_default(strategy, seconds, tmp_path):
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, strategy=strategy, logger=False
    )

    assert adapter_of(trainer).longest_wait == seconds
