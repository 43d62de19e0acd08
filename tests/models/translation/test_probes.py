"""T3: mask and position probes of the translation network, and findings for a wrong mask."""

import pytest
import torch
from torch.nn import functional as F

from lit_stability.checks.preflight import Expectations, Memorise, Subject, preflight
from models.translation import attention, transformer
from models.translation.batches import Batch
from models.translation.metrics import token_loss
from models.translation.probes import translation_probes


def report_of(model, batch, memorise=None, probes=True):
    """All checks on a network in train mode."""

    def step(model, batch):
        logits = model(batch.source_BS, batch.target_BT[:, :-1])
        return token_loss(logits, batch.target_BT[:, 1:], pad_id=0).total

    declared = translation_probes(batch, 0, lambda m: m) if probes else ()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    subject = Subject(model.train(), step, batch, [optimizer])
    return preflight(subject, Expectations(probes=tuple(declared), memorise=memorise))


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"attention": "manual"}, {"norm_position": "post"}, {"dropout": 0.3}),
        {"norm": "rmsnorm", "feedforward": "swiglu"},
    ],
    ids=str,
)
def test_preflight_of_a_healthy_network_finds_nothing(options, model_of, batch):
    """T3, T4."""
    report = report_of(model_of(**options), batch)
    assert not report.findings, report.text()
    assert {"masks", "positions", "modes"} <= set(report.ran)


@pytest.mark.parametrize(
    ("mask", "where"), [("causal_mask", "target mask"), ("padding_mask", "source mask")]
)
@pytest.mark.parametrize("attention_name", ["sdpa", "manual"])
def test_preflight_of_an_inverted_mask_calls_it_inverted(
    mask, where, attention_name, model_of, batch, monkeypatch
):
    """T3: True read as 'masked' is named in a second, not after days."""
    right = getattr(transformer, mask)
    monkeypatch.setattr(transformer, mask, lambda *args: ~right(*args))
    report = report_of(model_of(attention=attention_name), batch)
    named = [f for f in report.errors if f.check == "masks" and f.where == (where,)]
    assert any("the mask is inverted" in f.what for f in named), report.text()


def test_preflight_of_attention_that_reads_masks_inverted_names_both_masks(
    model_of, batch, monkeypatch
):
    """T3: the mistake in one place, as it is made."""
    right = attention.manual_attention
    inverted = lambda q, k, v, mask, dropout=0.0: right(q, k, v, ~mask, dropout)  # noqa: E731
    monkeypatch.setitem(attention.ATTENTION_FUNCTIONS, "manual", inverted)
    report = report_of(model_of(attention="manual"), batch)
    named = [f for f in report.errors if f.check == "masks" and "inverted" in f.what]
    assert {f.where for f in named} == {("target mask",), ("source mask",)}


@pytest.mark.parametrize("mask", ["causal_mask", "padding_mask"])
def test_preflight_of_a_missing_mask_names_the_leak(mask, model_of, batch, monkeypatch):
    """T3."""
    right = getattr(transformer, mask)
    monkeypatch.setattr(transformer, mask, lambda *args: torch.ones_like(right(*args)))
    report = report_of(model_of(), batch)
    (found,) = [f for f in report.errors if f.check == "masks"]
    assert "it is seen where it must not be" in found.what


def test_preflight_of_unscaled_embeddings_names_the_drowned_tokens(model_of, batch):
    """T1."""
    model = model_of(scale_embedding=False)
    model.source_embedding.weight.data.mul_(0.1)
    report = report_of(model, batch)
    named = [f.where for f in report.findings if f.check == "positions"]
    assert ("source embedding",) in named


def test_preflight_of_the_zombie_names_the_gains(model_of, batch):
    """T2."""
    report = report_of(model_of(init="zombie"), batch)
    assert [f.check for f in report.errors][:1] == ["gains"]


def test_preflight_of_inner_gains_at_zero_makes_a_note(model_of, batch):
    """T2: that one trains."""
    report = report_of(model_of(init="inner_zero"), batch, probes=False)
    assert [(f.check, f.severity) for f in report.findings] == [("gains", "note")]


def test_twenty_samples_are_learnt_by_heart_unless_the_labels_contradict(model_of):
    """T4."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(4, 40, (20, 6), generator=generator)
    start = torch.ones(20, 1, dtype=torch.long)
    target = torch.cat([start, torch.randint(4, 40, (20, 5), generator=generator)], dim=1)
    plan = Memorise(samples=20, steps=150, lr=3e-3)
    model = model_of(dropout=0.1)
    assert not report_of(model, Batch(source, target), plan, probes=False).errors
    same = Batch(source[:1].expand(20, -1), target)
    found = report_of(model, same, plan, probes=False).errors
    assert [f.check for f in found] == ["memorise"]


def test_nudged_padding_of_the_target_is_behind_all_that_counts(model_of, batch):
    """The probe of the future covers the target's padding: it is later than every counted token."""
    model = model_of()
    source, target = batch.source_BS, batch.target_BT[:, :-1]
    other = torch.where(target == 0, 3, target)
    counts = target != 0
    with torch.no_grad():
        gap = (model(source, target) - model(source, other))[counts].abs().max()
    assert float(gap) < 1e-5
    assert F.cosine_similarity(target.float(), other.float()).min() < 1
