"""The one mask convention, T1 and T3: True means "may attend"."""

import math

import pytest
import torch

from models.translation.attention import fused_attention, manual_attention
from models.translation.masks import causal_mask, check_mask_convention, padding_mask


def inverted(query, key, value, mask):
    return manual_attention(query, key, value, ~mask)


def unmasked(query, key, value, mask):
    return manual_attention(query, key, value, torch.ones_like(mask))


def broken(query, key, value, mask):
    return torch.full_like(query, math.nan)


def test_padding_mask_of_padded_ids_opens_tokens_only():
    """T1."""
    mask = padding_mask(torch.tensor([[5, 6, 0], [7, 0, 0]]), 0)
    assert mask.shape == (2, 1, 1, 3)
    assert mask[:, 0, 0].tolist() == [[True, True, False], [True, False, False]]


def test_causal_mask_opens_the_past_and_itself():
    """T1."""
    assert causal_mask(3, 3)[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_causal_mask_with_cached_keys_opens_all_of_them():
    assert causal_mask(2, 4)[0, 0].tolist() == [[True, True, True, False], [True] * 4]


def test_causal_mask_with_too_few_keys_raises():
    with pytest.raises(ValueError, match="got 3 queries and 2 keys"):
        causal_mask(3, 2)


@pytest.mark.parametrize("attend", [manual_attention, fused_attention])
def test_check_mask_convention_of_our_attentions_passes(attend):
    """T3."""
    check_mask_convention(attend)


@pytest.mark.parametrize(
    ("attend", "fault"),
    [(inverted, "gave 3: the mask is read inverted"), (unmasked, "ignored"), (broken, "neither")],
)
def test_check_mask_convention_of_a_faulty_attention_names_the_fault(attend, fault):
    """T3: the inverted boolean mask is found by a check."""
    with pytest.raises(ValueError, match=fault):
        check_mask_convention(attend)
