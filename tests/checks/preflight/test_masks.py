"""T3: probes by perturbation, on attention whose mask is right, missing or inverted."""

import pytest
import torch
from torch import nn

from lit_stability.checks.preflight import MaskProbe, nudged
from lit_stability.checks.preflight.masks import check_masks
from lit_stability.checks.preflight.report import DeclarationError, NotApplicableError
from tests.checks.preflight.nets import CLASSES, Attender, seeded, subject

IDS = torch.randint(1, CLASSES, (3, 8), generator=torch.Generator().manual_seed(0))


def causal_probe(at=3):
    """Position `at` is seen by itself and later ones, and by no earlier one."""
    late = torch.arange(8).expand(3, 8)

    def changed(model):
        with nudged(model.tokens, late == at):
            return model(IDS)

    return MaskProbe(
        name="the future",
        plain=lambda model: model(IDS),
        changed=changed,
        hidden=late < at,
        seen=late >= at,
        where="causal",
    )


def made(**options):
    return subject(seeded(Attender, **options), IDS, lambda m, ids: m(ids).square().mean())


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, None),
        ({"causal": False}, "it is seen where it must not be"),
        ({"invert": True}, "the mask is inverted"),
    ],
)
def test_masks_of_a_causal_layer_are_found_right_missing_and_inverted(options, fault):
    """T3."""
    found = check_masks(made(**options), [causal_probe()])
    assert [f.what.split(";")[0] for f in found] == ([f"the future: {fault}"] if fault else [])
    assert all(f.severity == "error" and f.where == ("causal",) for f in found)


def test_masks_that_hide_what_must_be_seen_are_called_so():
    """T3."""
    blind = MaskProbe(
        name="the input",
        plain=lambda model: model(IDS),
        changed=lambda model: model(IDS),
        seen=torch.ones(3, 8, dtype=torch.bool),
    )
    (found,) = check_masks(made(), [blind])
    assert "it is not seen where it must be" in found.what


@pytest.mark.parametrize(("learns", "faults"), [(True, 0), (False, 1)])
def test_masks_of_a_branch_that_starts_shut_are_reported_only_if_it_stays_shut(learns, faults):
    """T2, T3: a gain of zero that trains is no mask that covers too much."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(CLASSES, 4)
            self.gain = nn.Parameter(torch.zeros(4), requires_grad=learns)
            self.head = nn.Linear(4, 2)

        def forward(self, ids):
            return self.head(self.gain * self.tokens(ids).cumsum(1))

    def changed(model):
        with nudged(model.tokens, torch.ones(3, 8, dtype=torch.bool)):
            return model(IDS)

    everywhere = torch.ones(3, 8, dtype=torch.bool)
    probe = MaskProbe(name="the input", plain=lambda m: m(IDS), changed=changed, seen=everywhere)
    gated = subject(seeded(Gated), IDS, lambda m, ids: m(ids).square().mean())
    assert len(check_masks(gated, [probe])) == faults


def test_masks_are_probed_without_dropout_and_without_random_numbers():
    """T3: the answer is the same every time."""

    class Dropping(Attender):
        def forward(self, ids, attend=None):
            return nn.functional.dropout(super().forward(ids, attend), 0.5, self.training)

    dropping = subject(seeded(Dropping), IDS, lambda m, ids: m(ids).square().mean())
    dropping.original.train()
    for _ in range(3):
        assert check_masks(dropping, [causal_probe()]) == []
    assert dropping.original.training


def test_masks_without_a_probe_say_how_to_declare_one():
    with pytest.raises(NotApplicableError, match="preflight_probes"):
        check_masks(made(), [])


def test_probe_that_asks_nothing_is_refused():
    with pytest.raises(ValueError, match="'idle' tests nothing"):
        MaskProbe(name="idle", plain=lambda m: IDS, changed=lambda m: IDS)


def test_probe_of_outputs_of_different_shapes_is_refused():
    probe = MaskProbe(
        name="longer",
        plain=lambda model: model(IDS),
        changed=lambda model: model(IDS[:, :5]),
        hidden=torch.ones(3, 8, dtype=torch.bool),
    )
    with pytest.raises(DeclarationError, match="'longer' compares outputs of shapes"):
        check_masks(made(), [probe])


def test_nudged_changes_the_positions_asked_for_and_leaves_no_hook():
    embedding = nn.Embedding(5, 4)
    ids, where = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    where[0, 1] = True
    with nudged(embedding, where):
        changed = (embedding(ids) != embedding.weight[0]).any(-1)
        assert torch.equal(embedding(ids[:1]), embedding.weight[0].expand(1, 3, 4))
    assert torch.equal(changed, where)
    assert not embedding._forward_hooks
