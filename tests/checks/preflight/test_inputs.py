"""N5: the batch itself, and its masks."""

import pytest
import torch

from lit_stability.checks.preflight.inputs import check_batch
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.measurement.tensor_tree import named_tensors
from models.translation.batches import Batch

ZEROS, ONES = torch.zeros(2, 4), torch.ones(2, 4)
HALF = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])


def bad(value):
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    x[1, 2] = value
    return x


@pytest.mark.parametrize(
    ("batch", "severity", "where"),
    [
        ([bad(0.0)], None, ""),
        ([bad(float("nan"))], "error", "batch[0]"),
        ({"x": bad(float("-inf"))}, "error", "batch['x']"),
        ({"x": bad(2e4)}, "warning", "batch['x']"),
        ([torch.arange(256.0)], "warning", "batch[0]"),
        ([torch.arange(256.0) / 255], None, ""),
        ([torch.arange(100_000)], None, ""),
        ({"attention_mask": ONES.long()}, None, ""),
        ({"attention_mask": HALF}, "warning", "batch['attention_mask']"),
        ({"attention_mask": ZEROS.bool()}, "error", "batch['attention_mask']"),
        ({"key_padding_mask": ZEROS.bool()}, None, ""),
        ({"key_padding_mask": ONES.bool()}, "error", "batch['key_padding_mask']"),
        ({"mask": torch.where(ONES == 1, -torch.inf, 0.0)}, "error", "batch['mask']"),
        ({"mask": torch.full((3, 3), -torch.inf).triu(1)}, None, ""),
    ],
    ids=str,
)
def test_batch_is_judged_by_its_values_and_masks(batch, severity, where):
    """N5, C5: extreme data."""
    found = [(f.severity, f.where[0]) for f in check_batch(batch)]
    assert found == ([(severity, where)] if severity else [])


def test_batch_without_tensors_does_not_apply():
    with pytest.raises(NotApplicableError, match="no tensor"):
        check_batch({"text": ["a"]})


def test_named_tensors_follow_fields_keys_and_attributes():
    class Graph:
        def __init__(self):
            self.edges = ONES

    names = [n for n, _ in named_tensors({"b": Batch(ZEROS, ONES), "g": Graph()})]
    assert names == ["batch['b'].source_BS", "batch['b'].target_BT", "batch['g'].edges"]
