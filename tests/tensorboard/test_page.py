"""The Stability tab as somebody sees it: list, time line, detail, comparison (K5, V4)."""

import re

import pytest

from tests.tensorboard.page_runs import LAST, NAN_AT, RATE_AT, WEIGHT_AT, step_of
from tests.tensorboard.page_tab import TIMELINE, WINDOW


def test_list_of_three_incidents_tells_kind_cause_layer_response_and_outcome(tab):
    """S17: what happened, what was done, did it help."""
    tab.open()
    rows = [row.split("\t") for row in tab.all(".incidents tbody tr").all_inner_texts()]
    assert [row[2:4] for row in rows] == [
        ["150", "non-finite loss"],
        ["250", "non-finite weight"],
        ["360", "learning-rate jump"],
    ]
    assert rows[1][4:] == [
        "weights damaged from outside (likely)",
        "network.encoder.layers.2.norm.weight",
        "rolled back and replayed, learning rate x0.5",
        "● recovered",
    ]
    assert rows[2][7] == "■ stopped"
    assert "3 incidents: 2 recovered, 1 stopped" in tab.text(".summary")


@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        (20, ["step 20 · attempt 20", "gradient norm", "applied LR", "2^16", "16-mixed"]),
        (NAN_AT, ["Attempt 150", "NaN", "Incident 1: non-finite loss", "Rejected"]),
        (WEIGHT_AT - 5, ["attempt 268", "Attempt 246: Undone by the rollback of incident 2"]),
        (WEIGHT_AT + 20, ["LR factor", "÷2", "2^15"]),
        (RATE_AT + 5, ["÷99", "bf16-mixed"]),
    ],
)
def test_timeline_hovered_reads_the_values_of_that_attempt(tab, attempt, parts):
    text = tab.open().hover(TIMELINE, step_of(attempt))
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize(
    ("attempt", "read"), [(NAN_AT, NAN_AT), (61, 59), (NAN_AT + 7, NAN_AT + 7)]
)
def test_timeline_of_a_sampled_run_has_every_attempt_around_an_incident(tab, attempt, read):
    text = tab.open("sampled").hover(TIMELINE, step_of(attempt), shown=(9, LAST))
    assert re.search(rf"attempt {read}\b", text, re.IGNORECASE)


def test_timeline_dragged_over_shows_that_stretch_and_double_click_shows_all(tab):
    tab.open()
    box = tab.all(TIMELINE).bounding_box()
    x = [box["x"] + tab.px(TIMELINE, step) for step in (100, 300)]
    tab.page.mouse.move(x[0], box["y"] + 80)
    tab.page.mouse.down()
    tab.page.mouse.move(x[1], box["y"] + 90, steps=3)
    tab.page.mouse.up()
    first, last = tab.range()
    assert abs(first - 100) <= 2
    assert abs(last - 300) <= 2
    assert "step 200" in tab.hover(TIMELINE, 200, shown=tab.range())
    tab.all(TIMELINE).dblclick(position={"x": 500, "y": 80})
    assert tab.range() is None


def test_wheel_zooms_at_the_pointer_with_ctrl_alone(tab):
    tab.open().hover(TIMELINE, 400)
    tab.page.mouse.wheel(0, -300)
    tab.see(".timeline .hint")
    assert tab.range() is None
    tab.page.keyboard.down("Control")
    tab.page.mouse.wheel(0, -300)
    tab.page.keyboard.up("Control")
    tab.page.wait_for_function("location.hash.includes('from=')")
    first, last = tab.range()
    assert last - first < LAST * 0.7
    assert (400 - first) / (last - first) == pytest.approx(400 / LAST, abs=0.02)


def test_keyboard_zooms_pans_and_reads_values(tab):
    tab.open().all(TIMELINE).focus()
    tab.page.keyboard.press("+")
    first, last = tab.range()
    assert (last - first) == pytest.approx(LAST / 2, abs=2)
    tab.page.keyboard.press("ArrowRight")
    assert tab.range()[0] > first
    tab.page.keyboard.press("0")
    assert tab.range() is None
    tab.page.keyboard.press("Shift+ArrowRight")
    tab.page.keyboard.press("Shift+ArrowRight")
    assert "step 1 ·" in tab.text(f"{TIMELINE} .tooltip")


def test_scale_switched_to_linear_redraws_the_timeline(tab):
    before = tab.open().pixels(TIMELINE)
    tab.all('.timeline button:text-is("linear")').click()
    assert tab.all('.timeline button[aria-pressed="true"]').inner_text() == "linear"
    assert tab.pixels(TIMELINE) != before


def test_pin_clicked_opens_the_detail_of_its_incident(tab):
    tab.open().all(TIMELINE).click(position={"x": tab.px(TIMELINE, step_of(WEIGHT_AT)), "y": 13})
    tab.see(".detail header")
    assert "Incident 2: non-finite weight" in tab.text(".detail header")
    assert "p.stability.incident=2" in tab.hash()


def test_detail_tells_origin_causes_what_was_tried_and_how_to_load_the_folder(tab):
    """S15, V5: origin, what to try, when to ignore it."""
    tab.open(link="&p.stability.incident=1")
    text = tab.text(".detail")
    for part in (
        "attention.py:87, forward pass",
        "log made nan",
        "/home/ada/translate/models/attention.py:87",
        "weights float16[8, 4, 64, 64] in [-0.0012, 1]",
        "operation outside its domain",
        "Try: clamp the argument",
        "When to ignore: if it came with one batch",
        "step retried",
        "It recurred when the same steps were run again.",
        "runs/translation/incidents/00000150-1",
    ):
        assert part in text
    causes = tab.all(".causes > li strong:first-child").all_inner_texts()
    assert [causes[0], causes[3]] == ["operation outside its domain", "bad batch"]
    compile(tab.text(".code pre"), "scene", "exec")
    assert 'torch.load(folder / "scene.pt"' in tab.text(".code pre")


def test_detail_of_a_pruned_incident_says_so_and_offers_no_code(tab):
    tab.open(link="&p.stability.incident=2")
    assert "00000250-2: pruned to make room, only its report is left" in tab.text(".detail")
    assert not tab.all(".detail .code").count()


def test_detail_reads_every_step_around_the_incident(tab):
    tab.open(link="&p.stability.incident=2")
    box = tab.all(WINDOW).bounding_box()
    left, right = 64, box["width"] - 20
    middle = left + (WEIGHT_AT - 200.5) / 81 * (right - left)
    tab.all(WINDOW).hover(position={"x": middle, "y": 60})
    assert "attempt 251" in tab.text(f"{WINDOW} .tooltip")
    tab.all(".detail summary").first.click()
    assert tab.all(".detail tbody tr.rejected td").first.inner_text() == str(WEIGHT_AT)
    tab.all('.detail button:text("Show on the time line")').click()
    assert tab.range()[0] > 100


def test_keyboard_walks_the_incidents_and_escape_closes_the_detail(tab):
    tab.open().all(".incidents tbody button").first.press("Enter")
    assert "Incident 1" in tab.text(".detail h2")
    tab.page.keyboard.press("ArrowDown")
    assert "Incident 2" in tab.text(".detail h2")
    tab.all(".detail").focus()
    tab.page.keyboard.press("ArrowRight")
    assert "Incident 3" in tab.text(".detail h2")
    tab.page.keyboard.press("Escape")
    tab.gone(".detail")
    assert "incident" not in tab.hash()


def test_run_switched_shows_the_other_run_and_writes_it_into_the_address(tab):
    tab.open().all("#run").select_option("twin")
    tab.see(".incidents .message:has-text('No incident in this run')")
    assert "step 469" in tab.text(".summary")
    assert "p.stability.run=twin" in tab.hash()


def test_comparison_lays_another_run_over_the_time_line_and_lists_what_differs(tab):
    tab.open().all("#other").select_option("twin")
    tab.see(".differences")
    rows = dict(row.split("\t", 1) for row in tab.all(".differences tr").all_inner_texts())
    assert rows["last step"] == "476\t469\t−7"
    assert rows["incidents"] == "3 incidents: 2 recovered, 1 stopped\tno incident\t−3"
    assert re.fullmatch(r"[\d.]+\t[\d.]+\t[×÷][\d.]+", rows["final loss"])
    text = tab.hover(TIMELINE, 300)
    assert re.search(r"loss\s+[\d.]+ \| [\d.]+ \([×÷][\d.]+\)", text)
    text = tab.hover(TIMELINE, 240)
    assert "0.0015 | 0.003 (×2)" in text, "undone steps are excluded"
    assert "p.stability.compare=twin" in tab.hash()
    tab.all("#other").select_option("")
    tab.gone(".comparison")


def test_comparison_is_in_view_once_it_is_chosen(tab):
    tab.open(width=1280).page.set_viewport_size({"width": 1280, "height": 500})
    tab.all("main").evaluate("main => main.scrollTo(0, 1000)")
    tab.all("#other").select_option("twin")
    box = tab.see(".differences").all(".comparison").bounding_box()
    assert 0 <= box["y"] < 250


def test_damaged_run_says_so_shows_the_rest_and_is_not_shown_first(tab):
    tab.open("damaged")
    assert tab.all("#run").input_value() == "twin"
    assert tab.all(".damaged").count() == 0
    tab.all("#run").select_option("bad")
    text = tab.see(".damaged").text(".damaged")
    assert "stability/layers/grad_norm/ab is damaged" in text
    assert "2 incident records cannot be read" in text
    assert tab.all(".incidents tbody tr").count() == 3
    options = tab.all("#run option").all_inner_texts()
    assert [option for option in options if "damaged" in option] == ["bad (5 incidents, damaged)"]
