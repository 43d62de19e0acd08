"""Attention by hand and by kernel, T1 and T3: equal in outputs and in gradients."""

import pytest
import torch

from models.translation.attention import fused_attention, manual_attention
from models.translation.masks import causal_mask, padding_mask

ATTENTIONS = [manual_attention, fused_attention]


def attend_with_gradients(attention, mask):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 2, 5, 4, generator=generator).requires_grad_() for _ in range(3)]
    out = attention(*tensors, mask)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out, *(tensor.grad for tensor in tensors)]


MASKS = {
    "open": torch.ones(1, 1, 5, 5, dtype=torch.bool),
    "causal": causal_mask(5, 5),
    "padded": padding_mask(torch.tensor([[4, 4, 4, 0, 0], [4] * 5, [4, 0, 0, 0, 0]]), 0),
    "causal and padded": causal_mask(5, 5)
    & padding_mask(torch.tensor([[4, 4, 4, 0, 0], [4] * 5, [0, 0, 4, 4, 4]]), 0),
    "all empty": torch.zeros(3, 1, 5, 5, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attentions_under_any_mask_agree_in_outputs_and_gradients(mask):
    """T3: to 1e-5, empty rows included."""
    for ours, theirs in zip(
        *(attend_with_gradients(attention, mask) for attention in ATTENTIONS), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_over_nothing_is_zero_with_zero_gradients(attention):
    """T3: a row in which nothing may be attended must not become NaN."""
    out, *gradients = attend_with_gradients(attention, MASKS["all empty"])
    assert not out.any()
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_of_equal_scores_is_the_mean_of_the_open_values(attention):
    """T1: known answer, the mean of 1 and 3."""
    value = torch.tensor([1.0, 3.0, 50.0])[None, None, :, None].expand(1, 1, 3, 2)
    mask = torch.tensor([True, True, False])[None, None, None]
    out = attention(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2), value, mask)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 2.0))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision_with_large_scores_is_finite(attention, dtype):
    """T3: scores near the end of float16 do not overflow."""
    query, key = (torch.full((1, 1, 4, 64), 40.0, dtype=dtype) for _ in range(2))
    out = attention(query, key, torch.ones_like(key), causal_mask(4, 4))
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_networks_that_differ_in_attention_alone_agree(norm_position, model_of, batch):
    """T3: whole networks, outputs and parameter gradients on a padded batch."""
    gradients = []
    for attention in ("manual", "sdpa"):
        model = model_of(attention=attention, norm_position=norm_position)
        logits = model(batch.source_BS, batch.target_BT)
        logits.square().mean().backward()
        gradients.append([logits, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
