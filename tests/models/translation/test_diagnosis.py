"""The debugging checks of T4 on healthy and on faulty models."""

import pytest
import torch

from models.translation import transformer
from models.translation.diagnosis import (
    activation_norms,
    check_masking,
    sentence_accuracy,
    train_eval_gap,
)


def test_train_eval_gap_is_zero_without_dropout_and_not_with_it(model_of, batch):
    """T4: train() against eval()."""
    assert train_eval_gap(model_of(), *batch) == 0.0
    assert train_eval_gap(model_of(dropout=0.3), *batch) > 0.01


def test_checks_keep_the_mode_of_every_module_and_leave_no_hooks(model_of, batch):
    model = model_of(dropout=0.3)
    model.encoder.train()
    before = {name: module.training for name, module in model.named_modules()}
    train_eval_gap(model, *batch)
    sentence_accuracy(model, *batch)
    activation_norms(model, *batch)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())


def test_sentence_accuracy_of_an_untrained_model_is_zero(model_of, batch):
    """T4: teacher forcing against autoregressive decoding."""
    assert sentence_accuracy(model_of(), *batch) == (0.0, 0.0)


def test_check_masking_of_our_model_passes(model_of, batch):
    """T3."""
    for options in ({}, {"attention": "manual"}, {"norm_position": "post"}):
        check_masking(model_of(**options), *batch)


@pytest.mark.parametrize(
    ("mask", "leak"),
    [("causal_mask", "the last target"), ("padding_mask", "padding of the source")],
)
def test_check_masking_of_an_inverted_mask_names_the_leak(mask, leak, model_of, batch, monkeypatch):
    """T3: found by a check, not by days of debugging."""
    right = getattr(transformer, mask)
    monkeypatch.setattr(transformer, mask, lambda *args: ~right(*args))
    with pytest.raises(ValueError, match=leak):
        check_masking(model_of(), *batch)


def test_model_that_reads_masks_inverted_fails_the_check_in_both_attentions(model_of, batch):
    """T3: the deliberate fault is detected."""
    kinds = ("manual", "sdpa")
    models = [model_of(mask_convention="masked", attention=kind) for kind in kinds]
    for model in models:
        with pytest.raises(ValueError, match="the last target token"):
            check_masking(model, *batch)
    torch.testing.assert_close(*(model(*batch) for model in models))


def test_activation_norms_are_named_by_layer(model_of, batch):
    """T4: a final LayerNorm at its start gives every position the norm sqrt(D)."""
    norms = activation_norms(model_of(), *batch)
    stacks = ("encoder", "decoder")
    assert list(norms) == [
        f"{s}.{part}" for s in stacks for part in ("layers.0", "layers.1", "norm")
    ]
    assert norms["encoder.norm"] == pytest.approx(32**0.5, rel=1e-3)


def test_activation_norms_of_a_bypassed_stack_do_not_move(model_of, batch):
    """T4: the zombie's layers pass the stream on as it is."""
    norms = activation_norms(model_of(init="zombie"), *batch)
    assert norms["encoder.layers.0"] == norms["encoder.layers.1"] > 0
    assert norms["encoder.norm"] == 0.0


def test_sentence_accuracy_of_memorised_sentences_is_one(model_of, batch):
    """T4."""
    model = model_of().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model(batch.source_BS, batch.target_BT[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.target_BT[:, 1:].flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sentence_accuracy(model, *batch) == (1.0, 1.0)
    assert model.training
