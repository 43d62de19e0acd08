"""The picture of the gradients: rows, marks, words; and how parameters are joined to rows."""

import io
import math
import sys

import pytest
import torch
from torch import nn

from lit_stability.callbacks.gradient_flow.layer_rows import layer_rows
from lit_stability.callbacks.gradient_flow.picture import draw_gradient_flow
from lit_stability.figures import BLUE, RED, MatplotlibMissing, to_png
from lit_stability.measurement.gradient_distribution import gradient_details
from lit_stability.measurement.step_stats import GradientDetail


def detail(name, norm=1.0, zero_share=0.0, largest=None):
    """A gradient of a known norm, of four elements."""
    largest = norm / 2 if largest is None else largest
    return GradientDetail(
        name=name,
        norm=norm,
        mean=0.0,
        std=norm / 2,
        minimum=-largest,
        maximum=largest,
        zero_share=zero_share,
    )


def details_of(model, loss):
    loss.backward()
    return [GradientDetail(**each) for each in gradient_details(model.named_parameters())]


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def dots(figure):
    """Norm and row of each dot."""
    (dots,) = figure.axes[0].collections
    return {int(y): float(x) for x, y in dots.get_offsets()}


def marks(figure, marker):
    """Rows that have a mark of this shape on the left panel."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() == marker]
    return [int(line.get_ydata()[0]) for line in lines]


def test_picture_has_a_dot_for_each_layer_at_its_norm():
    """S8: norm by layer in the order of the model, on a logarithmic axis."""
    pytest.importorskip("matplotlib")
    norms = [1e-6, 1e-3, 1.0, 1e3]
    figure = draw_gradient_flow([detail(f"net.{i}.w", n) for i, n in enumerate(norms)], title="t")
    flow = figure.axes[0]
    assert labels(figure) == ["0.w", "1.w", "2.w", "3.w"]
    assert flow.get_ylabel() == "in net"
    assert dots(figure) == pytest.approx(dict(enumerate(norms)))
    assert flow.get_xscale() == "log"
    assert flow.get_xlim()[0] < 5e-7
    assert flow.get_xlim()[1] > 1e3
    assert flow.yaxis_inverted(), "the first layer is on top"
    assert figure.get_suptitle() == "t\nnorm of all gradients 1e+03"


def test_elements_and_zeros_of_a_layer_are_drawn():
    """S8: mean, min and max without their signs, percent of zeros."""
    pytest.importorskip("matplotlib")
    one = GradientDetail(
        name="w", norm=8.0, mean=-0.3, std=0.4, minimum=-4.0, maximum=2.0, zero_share=0.25
    )
    figure = draw_gradient_flow([one])
    drawn = {line.get_marker(): line.get_xdata()[0] for line in figure.axes[0].lines}
    assert (drawn["<"], drawn[">"], drawn["|"]) == (4.0, 2.0, pytest.approx(0.5))
    (bar,) = (line for line in figure.axes[0].lines if list(line.get_xdata()) == [0.3, 4.0])
    assert bar.get_marker() == "None"
    widths = [patch.get_width() for patch in figure.axes[1].patches]
    assert widths == [25.0]


def test_non_finite_and_all_zero_gradients_are_marked_and_not_dropped():
    """S8, S3."""
    pytest.importorskip("matplotlib")
    broken = [
        detail("a"),
        detail("b", math.nan),
        detail("c", math.inf, largest=math.inf),
        detail("d", 0.0, zero_share=1.0),
    ]
    figure = draw_gradient_flow(broken)
    assert labels(figure) == ["a", "b", "c", "d"]
    assert (marks(figure, "X"), marks(figure, "s")) == ([1, 2], [3])
    assert [text.get_text() for text in figure.axes[0].texts] == ["NaN", "Inf"]
    colors = [text.get_color() for text in figure.axes[0].get_yticklabels()]
    assert [color == RED for color in colors] == [False, True, True, False]
    assert figure.get_suptitle().endswith("gradients NaN; 2 of 4 not finite; 1 of 4 all zero")
    assert list(dots(figure)) == [0]
    assert 100.0 in [patch.get_width() for patch in figure.axes[1].patches]


def test_all_gradients_broken_still_make_a_picture():
    pytest.importorskip("matplotlib")
    assert len(to_png(draw_gradient_flow([detail("a", math.nan)]), dpi=60)) > 1000
    assert len(to_png(draw_gradient_flow([detail("a", 0.0, 1.0)]), dpi=60)) > 1000


def test_gradient_too_small_for_its_norm_is_not_all_zero():
    """Squares below 1e-45 are 0 in float32, and so is the norm: the largest element stands in."""
    pytest.importorskip("matplotlib")
    model = nn.Linear(2, 2, bias=False)
    figure = draw_gradient_flow(details_of(model, 1e-30 * model(torch.ones(1, 2)).sum()))
    assert dots(figure)[0] == pytest.approx(1e-30)
    assert marks(figure, "s") == []


def test_colour_tells_a_layer_far_below_and_far_above_the_others():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    norms = [1e-6, 1.0, 1.0, 1.0, 1e6]
    figure = draw_gradient_flow([detail(f"w{i}", n) for i, n in enumerate(norms)])
    (scatter,) = figure.axes[0].collections
    low, *middle, high = (tuple(c) for c in scatter.cmap(scatter.norm(scatter.get_array())))
    assert low == pytest.approx(to_rgba(BLUE), abs=0.01)
    assert high == pytest.approx(to_rgba(RED), abs=0.01)
    assert all(max(c[:3]) - min(c[:3]) < 0.02 for c in middle), "grey"


def test_tint_spans_the_norms_of_earlier_steps():
    """V3: what a layer had before, behind what it has now."""
    pytest.importorskip("matplotlib")
    history = [[detail("a", norm), detail("b", math.nan)] for norm in (2.0, 8.0, 4.0)]
    figure = draw_gradient_flow([detail("a", 100.0), detail("b")], history=history)
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in figure.axes[0].patches]
    assert spans == [(2.0, 8.0)]
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert "norm in earlier steps" in legend


def test_vanishing_gradient_leans_to_the_left():
    """S8: fourteen sigmoids, the gradient falls by a factor at each."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    layers = [m for _ in range(14) for m in (nn.Linear(16, 16), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    details = details_of(model, model(torch.randn(8, 16)).square().mean())
    figure = draw_gradient_flow(details)
    norms = [norm for row, norm in sorted(dots(figure).items()) if row % 2 == 0]
    assert len(norms) == 15
    assert norms == sorted(norms)
    assert norms[0] < 1e-8 * norms[-1]


def test_png_is_a_picture_of_many_colours_and_leaves_no_global_state():
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    details = [detail(f"net.{i}", 10.0 ** (i - 4)) for i in range(9)]
    content = to_png(draw_gradient_flow(details), dpi=60)
    pixels = image.imread(io.BytesIO(content))[..., :3]
    colours = {tuple(c) for c in (pixels * 255).astype(int).reshape(-1, 3).tolist()}
    assert pixels.shape[1] > 500
    assert len(colours) > 200
    assert to_png(draw_gradient_flow(details), dpi=60) == content
    assert pyplot.get_fignums() == []


def test_more_parameters_than_rows_are_joined_and_each_keeps_a_dot():
    pytest.importorskip("matplotlib")
    parts = ("weight", "bias")
    details = [detail(f"net.{i}.{p}", 3.0) for i in range(30) for p in parts]
    details[7] = detail("net.3.bias", math.nan)
    figure = draw_gradient_flow(details)
    assert labels(figure) == [str(i) for i in range(30)]
    assert dots(figure)[0] == pytest.approx(math.sqrt(18))
    assert [text.get_text() for text in figure.axes[0].texts] == ["NaN in 1 of 2"]
    assert "60 parameters in 30 rows" in figure.get_suptitle()
    members = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in members] == [2, 2, 2, 1, *[2] * 26]


@pytest.mark.parametrize(
    ("names", "most", "expected"),
    [
        (["a.w", "a.b", "c.w"], 3, ["a.w", "a.b", "c.w"]),
        (["a.w", "a.b", "c.w"], 2, ["a", "c"]),
        (["a.x.w", "a.x.b", "a.y.w", "c.w"], 3, ["a.x", "a.y", "c.w"]),
        ([f"net.{i}" for i in range(100)], 40, None),
        (["w1", "w2", "w3"], 2, ["w1 ... w2", "w3"]),
        (["a.w", "c.w", "a.b"], 3, ["a.w", "c.w", "a.b"]),
        (["a.w", "c.w", "a.b"], 1, ["a ... a"]),
    ],
)
def test_rows_are_neighbours_joined_at_the_deepest_level_that_fits(names, most, expected):
    rows = layer_rows([detail(name) for name in names], most)
    assert len(rows) <= most
    assert [member.name for row in rows for member in row.members] == names
    if expected is None:
        assert [len(row.members) for row in rows] == [3] * 33 + [1]
    else:
        assert [row.name for row in rows] == expected


@pytest.mark.parametrize(
    ("details", "options", "message"),
    [
        ([], {}, "details is empty"),
        ([detail("a")], {"layers": 0}, "most=0 must be at least 1"),
    ],
)
def test_bad_input_is_refused(details, options, message):
    with pytest.raises(ValueError, match=message):
        draw_gradient_flow(details, **options)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MatplotlibMissing, match=r"pip install 'lit-stability\[plots\]'"):
        draw_gradient_flow([detail("a")])
