"""What changed between two checkpoints: known answers, and how it is printed."""

import math

import pytest
import torch
from torch import nn

from lit_stability.checks.checkpoint import compare, format_comparison


def test_change_of_known_vectors():
    before = {"w": torch.tensor([3.0, 4.0]), "same": torch.ones(2), "zero": torch.zeros(2)}
    after = {"w": torch.tensor([-4.0, 3.0]), "same": torch.ones(2), "zero": torch.ones(2)}
    comparison = compare(before, after)
    assert [each.name for each in comparison.changes] == ["zero", "w", "same"], "most first"
    zero, w, same = comparison.changes
    assert (w.relative, w.cosine, w.largest) == (pytest.approx(math.sqrt(2)), 0.0, 7.0)
    assert (w.norm_before, w.norm_after) == (5.0, 5.0)
    assert (zero.relative, zero.cosine) == (math.inf, None)
    assert same.frozen
    assert same.cosine == pytest.approx(1.0)
    assert not w.frozen
    # 5 sqrt(2) and sqrt(2), over sqrt(25 + 2).
    assert comparison.relative == pytest.approx(math.sqrt(52 / 27))


def test_what_is_on_one_side_and_what_has_another_shape_or_type():
    before = {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(2)}
    after = {"b": torch.ones(3, 2), "c": torch.ones(2).half(), "d": torch.ones(2)}
    comparison = compare(before, after)
    assert (comparison.only_before, comparison.only_after) == (("a",), ("d",))
    assert comparison.reshaped == (("b", "(2, 3)", "(3, 2)"),)
    assert comparison.retyped == (("c", "float32", "float16"),)
    assert [each.name for each in comparison.changes] == ["c"]
    text = format_comparison(comparison)
    for line in (
        "only before: a",
        "only after: d",
        "different shape, not compared: b (2, 3) -> (3, 2)",
        "different dtype: c float32 -> float16",
        "bitwise unchanged: *",
    ):
        assert line in text


def test_frozen_parameters_are_named_in_groups():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))})
    model["head"] = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model["head"].weight += 1
    comparison = compare(before, model.state_dict())
    assert comparison.frozen == ("body.*", "head.bias")
    assert "bitwise unchanged: body.*, head.bias" in format_comparison(comparison)


def test_non_finite_elements_come_first_and_are_left_out_of_the_numbers():
    before = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0])}
    after = {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([3.0])}
    comparison = compare(before, after)
    a, b = comparison.changes
    assert (a.name, a.non_finite_after, a.relative, a.frozen) == ("a", 1, 0.0, False)
    assert b.relative == 2.0
    assert "0 -> 1" in format_comparison(comparison)


def test_large_tensors_are_compared_in_pieces(monkeypatch):
    a = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = a + 1
    monkeypatch.setattr("lit_stability.checks.checkpoint.measure._CHUNK", 64)
    (change,) = compare({"w": a}, {"w": b}).changes
    assert change.relative == pytest.approx(math.sqrt(1000) / float(a.norm()))
    assert change.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))


def test_table_is_bounded_and_says_what_is_left_out():
    before = {f"w{i}": torch.ones(2) for i in range(9)}
    after = {f"w{i}": torch.ones(2) + i for i in range(9)}
    text = format_comparison(compare(before, after), limit=3)
    assert "5 more tensors; --all shows them" in text
    assert text.index("w8") < text.index("w7") < text.index("w6")
    assert "more tensors" not in format_comparison(compare(before, after), limit=None)
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        format_comparison(compare(before, after), limit=0)
