"""T1: the scale of embeddings against that of positions, with known answers."""

import pytest
import torch
from torch import nn

from lit_stability.checks.preflight import PositionProbe
from lit_stability.checks.preflight.positions import check_positions
from lit_stability.checks.preflight.report import NotApplicableError


def probe(tokens, positions):
    a, b = torch.full((2, 4), tokens), torch.full((4,), positions)
    return PositionProbe(name="here", tokens=lambda _: a, positions=lambda _: b)


@pytest.mark.parametrize(
    ("tokens", "positions", "drowned"),
    [
        (1.0, 0.7, None),
        (0.21, 1.0, None),
        (4.9, 1.0, None),
        (0.19, 1.0, "the tokens are drowned by a factor of 5.26"),
        (0.09, 1.0, "the tokens are drowned by a factor of 11.1"),
        (20.0, 1.0, "the positions are drowned by a factor of 20"),
        (1.0, 0.0, None),  # a learnt table may begin at 0
    ],
)
def test_positions_are_compared_by_their_rms(tokens, positions, drowned):
    """T1: within a factor of five both can be read from the sum."""
    found = check_positions(nn.Identity(), [probe(tokens, positions)])
    assert (len(found) == 1 and drowned in found[0].what) if drowned else not found


@pytest.mark.parametrize("width", [64, 128, 512])
@pytest.mark.parametrize("scaled", [True, False])
def test_embeddings_without_the_root_of_their_width_are_drowned_by_sines(width, scaled):
    """T1."""
    table = torch.randn(100, width) * (1.0 if scaled else width**-0.5)
    angles = torch.rand(50, width // 2) * 6.28
    sines = torch.cat([angles.sin(), angles.cos()], dim=1)
    pair = PositionProbe(name="here", tokens=lambda _: table, positions=lambda _: sines)
    assert len(check_positions(nn.Identity(), [pair])) == (0 if scaled else 1)


@pytest.mark.parametrize("name", ["wpe", "pos_embed", "position_embeddings", "positions_LD"])
def test_positions_are_found_by_their_name_beside_an_embedding(name):
    model = nn.Module()
    model.tokens = nn.Embedding(9, 4)
    nn.init.normal_(model.tokens.weight, std=0.02)
    model.register_buffer(name, torch.ones(6, 4))
    (found,) = check_positions(nn.ModuleDict({"net": model}))
    assert found.where == (f"net.{name}",)


@pytest.mark.parametrize("name", ["composer", "output", "post"])
def test_positions_are_not_seen_where_there_are_none(name):
    model = nn.Module()
    model.tokens = nn.Embedding(9, 4)
    model.register_buffer(name, 1e6 * torch.ones(6, 4))
    with pytest.raises(NotApplicableError, match="no PositionProbe"):
        check_positions(model)
