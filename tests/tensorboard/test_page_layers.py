"""The heat map of layers by attempt, in a browser (K5, V4)."""

import re
import time

import pytest

from tests.tensorboard.page_runs import LAST, NAN_AT, RATE_AT, WEIGHT_AT, step_of
from tests.tensorboard.page_tab import HEATMAP


def colour(tab, x, y):
    """Red, green and blue of a pixel of the heat map."""
    pixel = """(canvas, at) => {
      const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      copy.drawImage(canvas, ...at.map((each) => each * devicePixelRatio), 1, 1, 0, 0, 1, 1);
      return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }"""
    return tab.all(f"{HEATMAP} canvas").first.evaluate(pixel, [x, y])


def warmth(tab, x, y):
    """Above 0 for orange, below 0 for blue."""
    red, _, blue = colour(tab, x, y)
    return red - blue


def test_heatmap_hovered_tells_layer_value_and_ratio_to_its_median(tab):
    """S8: layer by layer, on a logarithmic scale."""
    tab.open()
    text = tab.hover(HEATMAP, step_of(RATE_AT + 1), y=tab.row('[data-group="decoder.layers.1"]'))
    assert "network.decoder.layers.1.self_attention.query.weight" in text
    ratio = float(re.search(r"ratio\s*×([\d.]+)", text)[1])
    assert ratio > 20
    assert "NaN" in tab.hover(
        HEATMAP, step_of(NAN_AT), y=tab.row('[data-group="encoder.layers.0"]')
    )


def test_heatmap_group_folded_takes_one_row_and_says_how_many_layers(tab):
    tab.open()
    rows, group = tab.all(".layer-name"), tab.all('[data-group="encoder.layers.1"]')
    before = rows.count()
    group.press("Enter")
    assert group.get_attribute("aria-expanded") == "false"
    assert rows.count() == before - 4
    assert "(4)" in group.inner_text()
    assert group.evaluate("each => each === document.activeElement")
    tab.all('button:text-is("Fold all")').click()
    assert rows.count() == 0
    text = tab.hover(HEATMAP, step_of(NAN_AT), y=tab.row('[data-group="encoder.layers.1"]'))
    assert "NaN" in text
    assert "The most extreme of 4 layers" in text


def test_heatmap_marks_zero_and_nonfinite_unlike_any_ratio(tab):
    """Hatched, and with a mark above the map: not by colour alone."""
    tab.open()
    colours = """(canvas, [x, y, w, h]) => {
      const at = [x, y, w, h].map((each) => Math.round(each * devicePixelRatio));
      const copy = new OffscreenCanvas(at[2], at[3]).getContext("2d", { willReadFrequently: true });
      copy.drawImage(canvas, ...at, 0, 0, at[2], at[3]);
      return new Set(new Uint32Array(copy.getImageData(0, 0, at[2], at[3]).data.buffer)).size;
    }"""
    canvas = tab.all(f"{HEATMAP} canvas").first
    top, x = 42, tab.px(HEATMAP, 80)
    y = tab.row('.layer-name:text-is("norm") >> nth=2')
    assert canvas.evaluate(colours, [x, y - 2, 30, 4]) == 2
    assert canvas.evaluate(colours, [tab.px(HEATMAP, step_of(NAN_AT)) - 4, top - 9, 8, 8]) > 1
    assert canvas.evaluate(colours, [tab.px(HEATMAP, 300), top - 9, 8, 8]) == 1


def test_heatmap_colours_a_layer_by_its_own_median(tab):
    """Orange above, blue below, neither where it is as usual, whatever the layer's own size."""
    tab.open()
    warm, cold = tab.row('[data-group="decoder.layers.1"]'), tab.row('[data-group="head"]')
    assert warmth(tab, tab.px(HEATMAP, step_of(RATE_AT + 2)), warm) > 60
    assert warmth(tab, tab.px(HEATMAP, 3), cold) < -45
    for row in (warm, cold):
        assert abs(warmth(tab, tab.px(HEATMAP, 300), row)) < 30


def test_heatmap_does_not_colour_a_slow_drift(tab):
    """The norm of this layer falls to a thousandth; the median is that of the steps around."""
    y = tab.open().row('[data-group="encoder.layers.2"]')
    assert [
        step for step in (40, 240, 440) if abs(warmth(tab, tab.px(HEATMAP, step), y)) > 45
    ] == []


def test_heatmap_colours_stay_wherever_one_zooms(tab):
    """The median does not depend on the stretch in view."""
    levels = []
    for first, last in ((0, LAST), (step_of(RATE_AT), step_of(RATE_AT + 20))):
        tab.open(link=f"&p.stability.from={first}&p.stability.to={last}")
        at = tab.px(HEATMAP, step_of(RATE_AT + 2), (first, last))
        levels.append(warmth(tab, at, tab.row('[data-group="decoder.layers.1"]')))
        tab.page.goto("about:blank")
    assert levels[0] == levels[1] > 60


@pytest.mark.parametrize(("by", "faulty"), [(0.3, True), (-1, False), (2, False)])
def test_rejected_step_covers_no_healthy_ones_up_to_the_next_sample(tab, by, faulty):
    """Samples are 10 attempts apart, except for the rejected one."""
    at = step_of(WEIGHT_AT)
    shown = (at - 11, at + 13)
    tab.open("sampled", link=f"&p.stability.from={shown[0]}&p.stability.to={shown[1]}")
    row = tab.row('[data-group="encoder.layers.0"]')
    found = colour(tab, tab.px(HEATMAP, at + by, shown), row)
    assert (found == [0xB0, 0x00, 0x6D]) is faulty


def test_most_unusual_layers_come_first_when_asked_for(tab):
    tab.open().all('button:text-is("most unusual first")').click()
    assert tab.text(".group-name").endswith("decoder.layers.1")
    tab.all('button:text-is("model order")').click()
    assert tab.text(".group-name").endswith("embedding")


def test_quantity_switched_reads_the_update_ratio_and_says_where_there_is_none(tab, server):
    tab.open(link="&p.stability.run=twin")
    tab.all('button:text-is("update-to-weight ratio")').first.click()
    tab.see(".heatmap .message:has-text('No update-to-weight ratios')").gone(HEATMAP)
    query = {"run": "twin", "optimizer": "0", "quantity": "update_ratio"}
    assert ("layers", query) in server.requests
    tab.all('button:text-is("gradient norm")').click()
    tab.see(HEATMAP)


def test_twenty_thousand_steps_of_three_hundred_layers_draw_in_four_seconds(tab, server):
    """The server has its answers ready: what is timed is the page, from click to picture."""
    server.warm("large")
    started = time.perf_counter()
    tab.open("large")
    assert time.perf_counter() - started < 4
    assert tab.all(".group-name").count() == 25, "more than 60 rows are folded at first"
    assert tab.text('.heatmap button[aria-pressed="true"] >> nth=1') == "most unusual first"
