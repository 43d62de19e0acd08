"""Training, validation, test and checkpoints with a real Trainer, T1, T4 and T5."""

import lightning.pytorch as pl
import pytest
import torch

from models.translation.config import TransformerConfig
from models.translation.datamodule import TranslationDataModule
from models.translation.diagnosis import sentence_accuracy
from models.translation.metrics import token_loss
from models.translation.module import TranslationModule
from models.translation.vocabulary import Vocabulary

NETWORK = {"d_model": 32, "n_heads": 4, "d_feedforward": 64, "dropout": 0.0, "max_length": 32}
KEYS = ("loss", "loss_first_token", "loss_rest", "exact_match", "bleu", "chrf")


def make_data(**options):
    sizes = {"n_train": 64, "n_val": 24, "n_test": 24, "batch_size": 16}
    return TranslationDataModule(**{**sizes, **options})


def make_module(network=None, **options):
    torch.manual_seed(0)
    shape = TransformerConfig(**{**NETWORK, **(network or {})})
    return TranslationModule(network=shape, **{"warmup_steps": 5, **options})


def make_trainer(max_steps=8, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        **{**quiet, "enable_checkpointing": False, **options},
    )


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def test_fit_lowers_the_loss_and_logs_every_key():
    """T5."""
    losses, module, data = Losses(), make_module(lr=5e-3), make_data()
    trainer = make_trainer(40, callbacks=[losses], gradient_clip_val=1.0)
    trainer.fit(module, data)
    assert sum(losses.values[-4:]) < 0.7 * sum(losses.values[:4])
    assert set(trainer.callback_metrics) >= {"train/loss", *(f"val/{key}" for key in KEYS)}
    results = trainer.test(module, data, verbose=False)[0]
    assert set(results) == {f"test/{key}" for key in KEYS}
    assert 0 < results["test/loss"] < losses.values[0]


def test_validation_loss_is_the_mean_over_tokens_of_all_batches():
    """T4: and the parts add up to it by their numbers of tokens."""
    module, data = make_module(), make_data(batch_size=7)
    trainer = make_trainer()
    trainer.validate(module, data, verbose=False)
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
    n_tokens = sum(len(pair.target) + 1 for pair in data.splits.val)
    n_first = len(data.splits.val)
    parts = n_first * metrics["val/loss_first_token"]
    parts += (n_tokens - n_first) * metrics["val/loss_rest"]
    assert metrics["val/loss"] == pytest.approx(parts / n_tokens, rel=1e-5)


@pytest.mark.parametrize("schedule", ["none", "warmup_cosine", "onecycle", "inverse_sqrt"])
def test_fit_under_each_schedule_steps_it_once_per_step(schedule):
    module, data = make_module(schedule=schedule, lr=1e-3), make_data()
    trainer = make_trainer(8, limit_val_batches=0)
    trainer.fit(module, data)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    expected = {"none": 1e-3, "inverse_sqrt": 1e-3 * (5 / 9) ** 0.5, "warmup_cosine": 0.0}
    if schedule in expected:
        assert rate == pytest.approx(expected[schedule])
    assert rate <= 1e-3


def test_fit_in_bf16_mixed_is_finite():
    losses = Losses()
    make_trainer(6, callbacks=[losses], precision="bf16-mixed").fit(make_module(), make_data())
    assert all(map(torch.tensor(losses.values).isfinite().tolist().__getitem__, range(6)))


def test_training_step_in_float16_is_finite():
    """By hand, as Lightning has no float16 on the CPU."""
    module, data = make_module(), make_data()
    data.setup()
    module.build(data.vocabulary)
    batch = next(iter(data.train_dataloader()))
    with torch.autocast("cpu", dtype=torch.float16):
        logits = module(batch.source_BS, batch.target_BT[:, :-1])
        loss = token_loss(logits, batch.target_BT[:, 1:], pad_id=0).total
    assert logits.dtype == torch.float16
    loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_fit_twice_from_one_seed_gives_equal_weights():
    """T5: also with dropout."""
    runs = []
    for _ in range(2):
        module = make_module(network={"dropout": 0.1})
        pl.seed_everything(7, verbose=False)
        make_trainer(5, limit_val_batches=0).fit(module, make_data())
        runs.append(module.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_module_learns_20_samples_by_heart():
    """T4: dropout 0, no label smoothing, no scheduler; teacher forcing and free decoding."""
    module = make_module({"d_model": 64, "d_feedforward": 128}, schedule="none", lr=3e-3)
    data = make_data(n_train=20, batch_size=20)
    make_trainer(120, limit_val_batches=0).fit(module, data)
    batch = next(iter(data.train_dataloader()))
    assert sentence_accuracy(module.network, *batch) == (1.0, 1.0)
    assert set(module.eval().translate(batch.source_BS)) == {p.target for p in data.splits.train}


def test_translate_with_a_beam_gives_text():
    module, data = make_module(beam_size=3), make_data()
    predictions = make_trainer().predict(module, data)
    assert sum(map(len, predictions)) == 24
    assert all(isinstance(text, str) for texts in predictions for text in texts)


def test_checkpoint_brings_network_and_vocabulary_back(tmp_path):
    """T5: without the data, and with weights_only."""
    module, data = make_module(), make_data()
    trainer = make_trainer(3, limit_val_batches=0)
    trainer.fit(module, data)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["vocabulary"] == list(data.vocabulary.characters)
    loaded = TranslationModule.load_from_checkpoint(path, map_location="cpu")
    assert loaded.vocabulary == data.vocabulary
    assert loaded.network_config == module.network_config
    batch = next(iter(data.test_dataloader()))
    assert loaded.eval().translate(batch.source_BS) == module.eval().translate(batch.source_BS)


def test_fit_resumes_from_a_checkpoint(tmp_path):
    data, path = make_data(), tmp_path / "model.ckpt"
    trainer = make_trainer(3, limit_val_batches=0)
    trainer.fit(make_module(schedule="none"), data)
    trainer.save_checkpoint(path)
    resumed = make_trainer(5, limit_val_batches=0)
    resumed.fit(make_module(schedule="none"), make_data(), ckpt_path=path)
    assert resumed.global_step == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "schedule='step'"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_module_with_a_wrong_option_repeats_it(options, message):
    with pytest.raises(ValueError, match=message):
        TranslationModule(**options)


def test_module_without_vocabulary_says_how_to_give_one():
    with pytest.raises(ValueError, match=r"call module.build\(vocabulary\) first"):
        make_module()(torch.ones(1, 2), torch.ones(1, 2))
    data = make_data()
    data.setup()
    with pytest.raises(ValueError, match="TranslationDataModule"):
        make_trainer().fit(make_module(), data.train_dataloader())


def test_module_with_another_vocabulary_raises():
    module = make_module()
    module.build(Vocabulary("王怒"))
    module.build(Vocabulary("王怒"))
    with pytest.raises(ValueError, match="another vocabulary of 6 ids, got 5"):
        module.build(Vocabulary("王"))
    with pytest.raises(ValueError, match="vocabulary_size=9 but the vocabulary has 5"):
        make_module({"vocabulary_size": 9}).build(Vocabulary("王"))


def test_every_layer_of_the_module_is_named_for_what_it_does():
    """The names are what a monitor logs, so they are frozen."""
    module = make_module({"n_encoder_layers": 1, "n_decoder_layers": 1})
    module.build(Vocabulary("王"))
    names = {name.removeprefix("network.") for name, _ in module.network.named_children()}
    assert {"source_embedding", "encoder", "decoder", "projection"} <= names
    layer = {name for name, _ in module.network.decoder.layers[0].named_children()}
    assert {"self_attention", "cross_attention", "feedforward", "self_residual"} <= layer


def test_module_trains_and_decodes_on_the_real_corpus(corpus_on_disk):
    """T5: a few steps, and every metric."""
    module = make_module({"max_length": 64}, n_decoded_test=4)
    data = make_data(source="classical_modern", root=corpus_on_disk, max_length=64)
    losses = Losses()
    trainer = make_trainer(12, limit_val_batches=0, callbacks=[losses])
    trainer.fit(module, data)
    assert losses.values[-1] < losses.values[0]
    assert set(trainer.test(module, data, verbose=False)[0]) == {f"test/{key}" for key in KEYS}
