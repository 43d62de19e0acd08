"""The network as a whole, T1 and V2."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.translation.config import TransformerConfig
from models.translation.transformer import Transformer, sinusoidal_positions

SHAPES = [
    {},
    {"norm_position": "post"},
    {"norm": "rmsnorm", "feedforward": "swiglu"},
    {"tie_weights": False, "scale_embedding": False},
]


def test_sinusoidal_positions_follow_the_formula():
    """T1: against the formula in float64."""
    table = sinusoidal_positions(50, 8).numpy()
    for i in range(4):
        angle = np.arange(50) / 10_000 ** (2 * i / 8)
        np.testing.assert_allclose(table[:, 2 * i], np.sin(angle), atol=1e-5)
        np.testing.assert_allclose(table[:, 2 * i + 1], np.cos(angle), atol=1e-5)


@pytest.mark.parametrize("options", SHAPES)
def test_forward_of_a_padded_batch_gives_finite_logits_and_gradients(options, model_of, batch):
    """T1, T2, V2."""
    model = model_of(**options)
    logits = model(batch.source_BS, batch.target_BT)
    assert logits.shape == (*batch.target_BT.shape, 40)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["manual", "sdpa"])
def test_forward_under_autocast_is_close_to_full_precision(dtype, attention, model_of, batch):
    """T1: half precision on the CPU."""
    model = model_of(attention=attention)
    expected = model(batch.source_BS, batch.target_BT)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(batch.source_BS, batch.target_BT)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


def test_forward_of_an_empty_source_is_finite(model_of, batch):
    """T3: a source of padding alone."""
    model = model_of()
    logits = model(torch.zeros_like(batch.source_BS), batch.target_BT)
    logits.mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_forward_beyond_max_length_raises(model_of):
    with pytest.raises(ValueError, match="25 tokens exceeds max_length=24"):
        model_of()(torch.ones(1, 25, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))


def test_transformer_without_vocabulary_size_raises():
    with pytest.raises(ValueError, match="vocabulary_size=None"):
        Transformer(TransformerConfig())


def test_tied_weights_are_one_parameter(model_of):
    """T1: source, target and projection share one matrix, which all three train."""
    model = model_of()
    assert model.projection.weight is model.source_embedding.weight
    assert model.target_embedding.weight is model.source_embedding.weight
    names = {name for name, _ in model.named_parameters()}
    assert not names & {"projection.weight", "target_embedding.weight"}


def test_untied_weights_are_three_parameters(model_of):
    model = model_of(tie_weights=False)
    weights = [model.projection, model.source_embedding, model.target_embedding]
    assert len({id(module.weight) for module in weights}) == 3


def test_scale_embedding_multiplies_by_the_root_of_the_width(model_of, batch):
    """T1: scaling the table by 1/sqrt(D) undoes it."""
    scaled, plain = (model_of(scale_embedding=s, tie_weights=False) for s in (True, False))
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        for table in (scaled.source_embedding, scaled.target_embedding):
            table.weight.div_(math.sqrt(32))
    torch.testing.assert_close(
        scaled(batch.source_BS, batch.target_BT), plain(batch.source_BS, batch.target_BT)
    )


@pytest.mark.parametrize("d_model", [64, 128, 512])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_first_loss_is_near_the_logarithm_of_the_vocabulary_size(d_model, tie_weights):
    """T2: a healthy start."""
    torch.manual_seed(0)
    size = 1500
    config = TransformerConfig(vocabulary_size=size, d_model=d_model, tie_weights=tie_weights)
    model = Transformer(config).eval()
    source, target = torch.randint(4, size, (8, 20)), torch.randint(4, size, (8, 21))
    loss = F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())
    assert abs(loss.item() - math.log(size)) < 1.0
