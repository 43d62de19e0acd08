"""The picture: what is drawn, and the error if it cannot be."""

import io
import sys

import pytest
import torch
from torch import nn

from lit_stability.checks.precision_ranges import draw_ranges, measure_ranges
from lit_stability.figures import MatplotlibMissing, to_png
from tests.checks.precision_ranges.examples import Twins, mean_square, report_of, row_of


@pytest.fixture(scope="module")
def report():
    return measure_ranges(Twins(), mean_square, [torch.randn(64, 4)])


def words(figure):
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    labels = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()]
    return texts, labels


def test_picture_has_a_panel_for_each_kind_and_names_what_overflows(report):
    """S9."""
    pytest.importorskip("matplotlib")
    figure = draw_ranges(report, title="the twins")
    texts, labels = words(figure)
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        *("weights", "activations", "weight gradients", "activation gradients")
    ]
    assert {"hot", "cold", "(input)", "(loss)", "float16", "bfloat16"} <= set(labels)
    assert any(text.endswith("%") for text in texts)
    assert figure.get_suptitle().startswith("the twins\nfloat16: overflows; bfloat16: fits")
    assert "worst of" not in figure.get_suptitle()


def test_png_is_a_picture_of_many_colours_and_the_same_each_time(report):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    content = to_png(draw_ranges(report), dpi=60)
    pixels = image.imread(io.BytesIO(content))
    assert pixels.shape[1] > 600
    colours = {tuple(c) for c in (pixels[..., :3] * 255).astype(int).reshape(-1, 3).tolist()}
    assert len(colours) > 200
    assert to_png(draw_ranges(report), dpi=60) == content
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert pyplot.get_fignums() == [], "no global state"


def test_picture_keeps_the_worst_layers_in_the_order_of_the_model():
    pytest.importorskip("matplotlib")
    values = [1.0, 1e6, 1.0, 1e7, 1.0]
    rows = [row_of([v, 1.0], "activations", f"net.block.{i}") for i, v in enumerate(values)]
    figure = draw_ranges(report_of(*rows), layers=2)
    assert [label for label in words(figure)[1] if label.isdigit()] == ["1", "3"]
    assert "the 2 worst of 5 layers" in figure.get_suptitle()
    assert figure.axes[1].get_ylabel() == "in net.block"


def test_long_names_are_cut_in_the_middle():
    pytest.importorskip("matplotlib")
    name = "network." + "x" * 80 + ".tail"
    labels = words(draw_ranges(report_of(row_of([1.0], "weights", name), row_of([1.0]))))[1]
    (cut,) = (label for label in labels if "..." in label)
    assert len(cut) <= 52
    assert cut.endswith(".tail")


def test_number_of_layers_below_one_is_refused(report):
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        draw_ranges(report, layers=0)


def test_missing_matplotlib_names_the_extra(report, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MatplotlibMissing, match=r"pip install 'lit-stability\[plots\]'"):
        draw_ranges(report)


def test_picture_of_weights_alone_has_one_panel():
    pytest.importorskip("matplotlib")
    figure = draw_ranges(report_of(row_of(nn.Linear(4, 4).weight.detach(), "weights")))
    assert len(figure.axes) == 3, "the rulers, the panel, the colour bar"
