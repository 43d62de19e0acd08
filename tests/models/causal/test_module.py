"""Training, evaluation and checkpoints with a real Trainer, and the suite on top, K4."""

import lightning.pytorch as pl
import pytest
import torch

from lit_stability import stability_callbacks
from models.causal.heads import HeadsConfig
from models.causal.losses import loss_at_chance
from models.causal.module import CausalModule
from models.causal.network import CausalClassifier

KEYS = ("loss", "accuracy", "num_accuracy", "num_rank", "num_probability", "num_false")
KEYS += ("value_mae", "value_median_error")


def make_trainer(max_steps=8, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        num_sanity_val_steps=0,
        **{**quiet, "enable_checkpointing": False, **options},
    )


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_fit_starts_at_chance_learns_and_logs_every_key(trunk, data_of, gate):
    losses, data = Losses(), data_of()
    module = CausalModule(backbone=trunk, lr=1e-2, gate=gate)
    trainer = make_trainer(24, callbacks=[losses])
    pl.seed_everything(0, verbose=False)
    trainer.fit(module, data)
    n_classes = module.network.num_id + 1
    assert losses.values[0] == pytest.approx(loss_at_chance(n_classes), rel=0.2)
    assert losses.values[-1] < 0.5 * losses.values[0]
    step_keys = {"train/loss", "train/one_vs_rest", "train/regression"}
    assert set(trainer.callback_metrics) >= step_keys | {f"val/{key}" for key in KEYS}
    (results,) = trainer.test(module, data, verbose=False)
    assert set(results) == {f"test/{key}" for key in KEYS}


def test_frozen_trunk_stays_in_eval_mode_and_as_it_was(trunk, data_of):
    module = CausalModule(backbone=trunk, lr=1e-1)
    module.build()
    before = {n: p.clone() for n, p in module.network.trunk.named_parameters()}
    make_trainer(3).fit(module, data_of())
    assert module.network.training
    assert not module.network.trunk.training
    after = dict(module.network.trunk.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unfrozen_trunk_trains(trunk, data_of):
    module = CausalModule(backbone=trunk, freeze=False)
    module.build()
    before = module.network.trunk.layers[0].mlp.up_proj.weight.clone()
    make_trainer(2).fit(module, data_of())
    assert not torch.equal(before, module.network.trunk.layers[0].mlp.up_proj.weight)


def test_unusual_numbers_train_to_finite_weights(trunk, data_of):
    """C5: extreme values, zeros, negative and missing ones are no reason to die."""
    data = data_of(unusual=("zero", "negative", "extreme", "missing"), unusual_share=0.5)
    losses, module = Losses(), CausalModule(backbone=trunk, lr=1e-2)
    callbacks = [losses, *stability_callbacks()]
    make_trainer(16, callbacks=callbacks).fit(module, data)
    assert all(abs(each) < float("inf") for each in losses.values)
    assert all(p.isfinite().all() for p in module.parameters())


def test_checkpoint_brings_back_the_network_it_was(trunk, data_of, tmp_path, batch):
    module = CausalModule(backbone=trunk, heads=HeadsConfig(width=12, threshold=0.5))
    trainer = make_trainer(2)
    trainer.fit(module, data_of())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = CausalModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True).eval()
    assert isinstance(loaded.network, CausalClassifier)
    module.eval()
    with torch.no_grad():
        one, other = module(batch), loaded(batch)
    assert torch.equal(one.scores_BK.loc, other.scores_BK.loc)
    assert loaded.heads_config == module.heads_config


def test_prediction_is_the_median_and_samples_spread_around_it(module_of, batch):
    module = module_of().eval()
    _, median = module.predict_step(batch, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = module.sample(batch, 2000, generator=generator)
        scale = module(batch).value_B.scale
    assert ((drawn.median(dim=0).values - median).abs() < 0.2 * scale).all()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lr": 0.0}, r"lr=0\.0 must be greater than 0"),
        ({"gate": 2.0}, r"gate=2\.0 must be from 0, soft, to 1, hard"),
        ({"regression_weight": -1.0}, r"regression_weight=-1\.0 must be 0 or more"),
        ({"loss_form": "exact"}, "loss_form='exact' is unknown"),
    ],
)
def test_impossible_option_is_refused_with_its_value(options, problem):
    with pytest.raises(ValueError, match=problem):
        CausalModule(**options)
