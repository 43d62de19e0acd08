"""The pictures of a report and of a comparison."""

import math

import pytest
import torch

from lit_stability.checks.checkpoint import compare, draw_comparison, draw_health, examine
from lit_stability.figures import RED, to_png
from tests.checks.checkpoint.examples import checkpoint_of, read


def labels(figure):
    return {text.get_text(): text.get_color() for text in figure.axes[0].get_yticklabels()}


def marks(axis, marker):
    """Row and value of each mark of a shape."""
    lines = [line for line in axis.lines if line.get_marker() == marker]
    return {int(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in lines}


def test_health_has_weights_and_moments_and_marks_what_is_wrong(tmp_path):
    """V4."""
    pytest.importorskip("matplotlib")
    checkpoint = read(checkpoint_of(tmp_path))
    checkpoint["state_dict"]["body.3.weight"][0, 0] = math.nan
    checkpoint["state_dict"]["norm.weight"].zero_()
    report = examine(checkpoint)
    figure = draw_health(report, title="t")
    weights, moments = figure.axes
    names = list(labels(figure))
    assert "head.weight" not in names, "it is the embedding, in the same memory"
    assert labels(figure)["body.3.weight"] == RED
    assert marks(weights, "X") == {names.index("body.3.weight"): 1.0}
    assert marks(weights, "s")[names.index("norm.weight")] == 0.0
    tensors = {each.name: each for each in report.tensors}
    bias = names.index("head.bias")
    assert marks(weights, "o")[bias] == pytest.approx(tensors["head.bias"].rms)
    assert marks(weights, ">")[bias] == pytest.approx(tensors["head.bias"].largest)
    moment = next(each for each in report.moments if each.name == "head.bias")
    assert marks(moments, "D")[bias] == pytest.approx(moment.norms["exp_avg"] / math.sqrt(10))
    assert figure.get_suptitle() == "t\n2 errors"
    assert len(to_png(figure, dpi=60)) > 5000


def test_health_of_many_tensors_keeps_those_with_a_finding():
    pytest.importorskip("matplotlib")
    state = {f"w{i}": torch.full((i + 1,), 0.1) for i in range(60)}
    state["w3"][0] = math.nan
    figure = draw_health(examine(state), layers=3)
    assert list(labels(figure)) == ["w3", "w58", "w59"]
    assert figure.get_suptitle() == "1 error, 3 of 60 tensors"
    assert len(figure.axes) == 1, "no optimizer, no panel"


def test_comparison_is_drawn_with_what_changed_most_on_top():
    pytest.importorskip("matplotlib")
    before = {"a": torch.ones(4), "b": torch.ones(4), "same": torch.ones(4), "c": torch.zeros(4)}
    after = {"a": torch.full((4,), 1.5), "b": torch.full((4,), 3.0), "same": torch.ones(4)}
    after["c"] = torch.ones(4)
    figure = draw_comparison(compare(before, after))
    assert list(labels(figure)) == ["c", "b", "a"]
    relative, largest = figure.axes
    assert marks(relative, "o") == {1: 2.0, 2: 0.5}
    assert marks(relative, "X") == {0: 1.0}
    assert marks(largest, ">") == {0: 1.0, 1: 2.0, 2: 0.5}
    assert len(to_png(figure, dpi=60)) > 5000
    assert "the 1 that changed most of 3" in (
        draw_comparison(compare(before, after), layers=1).get_suptitle()
    )


def test_what_cannot_be_drawn_is_refused():
    pytest.importorskip("matplotlib")
    state = {"a": torch.ones(4)}
    with pytest.raises(ValueError, match="none of 1 tensors has changed"):
        draw_comparison(compare(state, state))
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        draw_health(examine(state), layers=0)
