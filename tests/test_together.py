"""Interaction of replay, checkpoints on disk and restarts."""

import functools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    LastKnownGood,
    find_last_good,
    fit_with_recovery,
    stability_callbacks,
)
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import make_trainer
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net

WEIGHT = functools.partial(CorruptWeight, parameter="first.0.weight")


def data(nan=(), **options):
    return loader(Batches(40, nan=nan, **options))


def suite(**options):
    return [GradientMonitor(), LastKnownGood(**options), AutoRollback()]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("saved_at", [25, 31, 34, 36, 45])
def test_checkpoint_written_during_a_replay_resumes_with_the_next_batch(saved_at, tmp_path):
    """The loader is ahead of the batches that are being replayed."""

    class Stops(Callback):
        """Interrupts the fit the second time that the step is run."""

        seen = 0

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == saved_at:
                self.seen += 1
            if trainer.global_step == saved_at and self.seen == 1 + (20 < saved_at < 34):
                raise KeyboardInterrupt

    checkpoint = ModelCheckpoint(
        tmp_path / "c", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    # The NaN of a weight shows at step 34, and everything from step 20 on is replayed.
    faults = FaultInjector([WEIGHT(step=33)])
    options = {"max_epochs": 2, "enable_checkpointing": True}
    with pytest.raises(SystemExit):
        run(tmp_path, Net, data(), [faults, *suite(), Stops(), checkpoint], **options)
    file = tmp_path / "c" / f"step={saved_at - 1}.ckpt"
    resumed = run(tmp_path / "r", Net, data(), suite(), max_epochs=2, resume=file)
    clean = run(tmp_path / "clean", Net, data(), [], max_epochs=2)
    found = differences(resumed, clean)
    assert not {"weights", "optimizers", "generators", "global_step"} & set(found)


def test_run_that_was_rolled_back_is_resumed_exactly_from_its_last_good(tmp_path):
    """S12: skipped batches stay skipped, and no batch is trained on twice."""
    options = {"every_n_steps": 10, "confirm_after": 3}
    first = [FaultInjector([NanLoss(step=12), WEIGHT(step=33)]), *suite(**options)]
    run(tmp_path, Net, data(nan=(5,)), first, max_epochs=1)
    good = find_last_good(tmp_path)
    assert torch.load(good, weights_only=True)["global_step"] >= 20
    resumed = run(tmp_path / "r", Net, data(nan=(5,)), suite(), max_epochs=2, resume=good)
    clean = run(tmp_path / "clean", Net, data(left_out=(5,)), [], max_epochs=2)
    found = differences(resumed, clean)
    assert not {"weights", "optimizers", "generators", "global_step"} & set(found)


class Crashes(Net):
    """Fails once, in the middle of an epoch."""

    left = 1

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 47 and self.left:
            self.left -= 1
            raise OSError("the network drive went away")
        return super().training_step(batch, batch_idx)


def test_recovery_with_the_default_suite_ends_where_the_undisturbed_run_ends(tmp_path):
    """S13: from the last good checkpoint, mid-epoch, bit for bit."""

    def make(**overrides):
        callbacks = [
            each if not isinstance(each, LastKnownGood) else LastKnownGood(every_n_steps=10)
            for each in stability_callbacks()
        ]
        return make_trainer(tmp_path, callbacks, **{"max_steps": -1, "max_epochs": 2, **overrides})

    torch.manual_seed(3)
    module = Crashes()
    result = fit_with_recovery(make, module, train_dataloaders=data())
    assert len(result.crashes) == 1
    torch.manual_seed(3)
    clean = Net()
    make_trainer(tmp_path / "clean", [], max_steps=-1, max_epochs=2).fit(clean, data())
    pairs = zip(module.state_dict().values(), clean.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
