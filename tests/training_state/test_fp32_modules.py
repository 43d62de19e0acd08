"""S9: modules that compute in float32 amid 16-bit ones."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lit_stability.measurement.half_precision import cast
from lit_stability.training_state.fp32_modules import (
    fp32_modules_of,
    is_kept_in_fp32,
    keep_in_fp32,
    matching,
    release_from_fp32,
)


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        return x + self.softmax(self.linear(self.norm(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.final_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["head"], ["head"]),
        (["*norm*"], ["blocks.0.norm", "blocks.1.norm", "final_norm"]),
        (["LayerNorm"], ["blocks.0.norm", "blocks.1.norm", "final_norm"]),
        ([nn.Softmax, "head"], ["blocks.0.softmax", "blocks.1.softmax", "head"]),
        (["blocks.1", "blocks.1.norm"], ["blocks.1"]),
        (["blocks"], ["blocks.0", "blocks.1"]),
        ([], []),
    ],
)
def test_patterns_name_the_outermost_modules_that_compute(patterns, names):
    assert matching(Model(), patterns) == names


@pytest.mark.parametrize(("pattern", "words"), [("nrom", "'nrom'"), (nn.Conv2d, "Conv2d")])
def test_pattern_that_matches_nothing_is_an_error_that_repeats_it(pattern, words):
    with pytest.raises(ValueError, match=f"{words} matches no module of Model"):
        matching(Model(), ["head", pattern])


def autocast(model, x, dtype=torch.float16):
    with torch.autocast("cpu", dtype):
        return model(x)


def test_module_kept_in_fp32_overflows_no_more_and_the_rest_stays_in_16_bits():
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, 300.0)
    x = torch.full((1, 4), 300.0)
    assert not torch.isfinite(autocast(linear, x)).all()
    keep_in_fp32(linear)
    out = autocast(linear, x)
    assert out.dtype == torch.float32
    assert torch.equal(out, linear(x))


def test_module_kept_in_fp32_in_a_half_precision_model_converts_its_weights_and_returns_halves():
    model = Model().bfloat16()
    keep_in_fp32(model.final_norm)
    assert model.final_norm.weight.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_module_kept_in_fp32_has_the_same_names_values_and_hooks():
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    keep_in_fp32(model.blocks[0])
    assert list(model.state_dict()) == list(reference.state_dict())
    assert not model.blocks[0]._forward_hooks
    assert not model.blocks[0]._forward_pre_hooks
    x = torch.randn(3, 8)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_module_kept_in_fp32_is_one_and_computes_with_its_own_weights(duplicate):
    model = Model()
    keep_in_fp32(model.head)
    other = duplicate(model)
    assert fp32_modules_of(other) == ["head"]
    with torch.no_grad():
        other.head.weight.zero_()
        other.head.bias.fill_(1.0)
    assert torch.equal(other(torch.randn(2, 8)), torch.ones(2, 2))
    assert not torch.equal(model(torch.randn(2, 8)), torch.ones(2, 2))


def test_released_module_computes_as_before_even_if_its_forward_was_replaced_before():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x * 2
    keep_in_fp32(linear)
    keep_in_fp32(linear)
    x = torch.randn(2, 4, dtype=torch.float16)
    assert linear(x).dtype == torch.float32
    release_from_fp32(linear)
    release_from_fp32(linear)
    assert not is_kept_in_fp32(linear)
    assert torch.equal(linear(x), x * 2)


def test_module_kept_in_fp32_compiles_without_a_graph_break():
    model = Model()
    keep_in_fp32(model.final_norm)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 8)
    assert torch.equal(autocast(compiled, x), autocast(model, x))


def test_cast_reaches_tensors_in_containers_and_leaves_the_rest():
    from collections import namedtuple

    Pair = namedtuple("Pair", "a b")
    half, whole = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.int64)
    value = {"x": [half, whole], "y": Pair(half, "text"), "z": (None, 3)}
    result = cast(value, torch.float32)
    assert result["x"][0].dtype == torch.float32
    assert result["x"][1] is whole
    assert isinstance(result["y"], Pair)
    assert result["y"].a.dtype == torch.float32
    assert result["z"] == (None, 3)
