"""S9: the faster precision is tried again, and what is in force is remembered."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    PrecisionFallback,
    stability_callbacks,
)
from lit_stability.incidents.report import responses_text
from tests.conftest import flat, make_trainer
from tests.precision import Net, data, fp16, suite, train


def test_faster_precision_is_tried_again_and_stays_if_it_holds(tmp_path):
    loader = data()
    loader.dataset.tensors[0][: 30 * 16] *= 1e5
    callbacks = suite(max_fp32_modules=0, try_again_after=40)
    module, trainer = train(tmp_path, callbacks, loader, **fp16())
    (incident,) = callbacks[0].incidents
    assert responses_text(incident) == "precision 16-mixed -> bf16-mixed, step retried"
    assert trainer.precision == "16-mixed"
    assert torch.isfinite(flat(module)).all()


class Precisions(Callback):
    """The precision of each step taken."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.precision)


def test_faster_precision_that_fails_again_is_tried_ever_later_and_then_no_more(tmp_path):
    """Invariant 4: tries are bounded; each costs one step, retried."""
    seen = Precisions()
    callbacks = [*suite(max_fp32_modules=0, try_again_after=20, failures=2), seen]
    module, trainer = train(tmp_path, callbacks, data(inputs=1e5), 200, **fp16())
    tries = [i for i, name in enumerate(seen.seen) if name == "16-mixed"]
    assert tries == [0, 21, 62]
    assert trainer.precision == "bf16-mixed"
    begun, _ = train(tmp_path, [], data(inputs=1e5), 200, precision="bf16-mixed")
    assert torch.equal(flat(module), flat(begun))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("module", "loader", "options", "precision"),
    [
        (Net, lambda: data(inputs=1e5), fp16, "16-mixed"),
        (lambda: Net(own_loss=True), lambda: data(targets=2000.0), fp16, "bf16-mixed"),
        (lambda: Net(lr=1e-4), data, lambda: {"precision": "bf16-true"}, "bf16-mixed"),
        (Net, data, lambda: {"precision": "16-true"}, "bf16-mixed"),
    ],
    ids=["a module kept in fp32", "fp16", "bf16 weights", "fp16 weights"],
)
def test_choice_survives_a_resume_bit_for_bit(module, loader, options, precision, tmp_path):
    """With dropout and in mid-epoch, by way of `LastKnownGood`'s data position."""
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=150, save_top_k=-1)
    whole, _ = train(
        tmp_path,
        [*stability_callbacks(), keep],
        loader(),
        180,
        module=module,
        enable_checkpointing=True,
        **options(),
    )
    callbacks = stability_callbacks()
    resumed = module()
    trainer = make_trainer(tmp_path, callbacks, max_steps=180, **options())
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "step=150.ckpt")
    assert trainer.precision == precision
    assert callbacks[0].incidents == []
    assert torch.equal(flat(whole), flat(resumed))


def test_next_fit_of_the_same_callbacks_begins_where_the_last_one_ended(tmp_path):
    callbacks = suite(max_fp32_modules=0)
    for incidents in (1, 0):
        module, trainer = train(tmp_path, callbacks, data(inputs=1e5), 30, **fp16())
        assert trainer.precision == "bf16-mixed"
        assert len(callbacks[0].incidents) == incidents
        assert all(x == x for x in module.losses[-29:])


def test_run_resumed_on_the_last_level_can_fall_back_again_after_it_has_come_up(tmp_path):
    """bf16 rounds 0.999 to 1, and the logarithm of its rest is infinite."""
    options = {"precision": "bf16-mixed", "module": Rounded}
    callbacks = [GradientMonitor(), PrecisionFallback(try_again_after=20), AutoRollback()]
    _, trainer = train(tmp_path, callbacks, data(), 10, **options)
    assert trainer.precision == "32-true"
    _, trainer = train(tmp_path, callbacks, data(), 60, **options)
    fallen = "precision bf16-mixed -> 32-true, step retried"
    incidents = callbacks[0].incidents
    assert [(i.first.step, responses_text(i)) for i in incidents] == [(10, fallen), (50, fallen)]
    assert trainer.precision == "32-true"


class Rounded(Net):
    """A probability of 0.999, and the logarithm of its rest."""

    def training_step(self, batch, batch_idx):
        rest = 1 - torch.sigmoid(self.net(batch[0]).squeeze(-1).clamp(-0.5, 0.5) + 7.0)
        return -torch.log(rest).float().mean()
