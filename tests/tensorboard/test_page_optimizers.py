"""The choice of an optimizer, where a run has several (K5, V4)."""

import re

import pytest

from tests.tensorboard.page_runs import NAN_AT, WEIGHT_AT
from tests.tensorboard.page_tab import HEATMAP, TIMELINE

END = 498


def norm(text):
    return float(re.search(r"gradient norm\s+([\d.]+)", text)[1])


def test_single_optimizer_offers_no_choice(tab):
    tab.open()
    assert not tab.all("#optimizer").is_visible()
    assert not tab.all("label[for=optimizer]").is_visible()
    tab.all(".incidents tbody button").first.press("Enter")
    assert "optimizer" not in tab.text(".detail .when")


def test_optimizer_chosen_by_keyboard_shows_its_steps_and_layers(tab, server):
    tab.open("gan", link="&p.stability.from=0&p.stability.to=100")
    assert tab.all("#optimizer option").all_inner_texts() == ["0: generator", "1: discriminator"]
    assert norm(tab.hover(TIMELINE, 40, shown=(0, 100))) < 100
    server.requests.clear()
    tab.all("#run").focus()
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("ArrowDown")
    tab.see(".page[data-state=ready]").see(HEATMAP)
    assert tab.hash().endswith("p.stability.optimizer=1&p.stability.from=0&p.stability.to=100")
    text = tab.hover(TIMELINE, 41, shown=(0, 100))
    assert "attempt 41\n" in text
    assert norm(text) > 1000
    asked = {
        (route, query["optimizer"])
        for route, query in server.requests
        if route not in ("incidents", "verdict")
    }
    assert asked == {("steps", "1"), ("layers", "1")}


@pytest.mark.parametrize(("optimizer", "attempt"), [(0, NAN_AT - 3), (1, WEIGHT_AT - 3)])
def test_attempts_around_an_incident_are_those_of_the_optimizer_shown(tab, optimizer, attempt):
    """The other's norm is a thousand times as large: among one's own it would be a false spike."""
    tab.open(
        "gan", link=f"&p.stability.optimizer={optimizer}&p.stability.from=140&p.stability.to=260"
    )
    text = tab.hover(TIMELINE, attempt, shown=(140, 260))
    assert (norm(text) > 1000) is bool(optimizer)


@pytest.mark.parametrize(("incident", "optimizer"), [(1, 0), (2, 1)])
def test_incident_shows_the_steps_of_the_optimizer_that_it_befell(tab, incident, optimizer):
    tab.open("gan", link=f"&p.stability.incident={incident}")
    assert f"optimizer {optimizer}" in tab.text(".detail .when")
    tab.all(".detail summary").first.click()
    _, *rows = tab.all(".detail .frame tr").all_inner_texts()
    attempts = [int(row.split()[0]) for row in rows]
    assert {attempt % 2 for attempt in attempts} == {optimizer}


@pytest.mark.parametrize("run", ["gan", "single"])
def test_link_opens_the_optimizer_if_the_run_has_it(tab, run):
    tab.open("gan", link=f"&p.stability.run={run}&p.stability.optimizer=1")
    assert ("p.stability.optimizer=1" in tab.hash()) is (run == "gan")
    assert tab.all("#optimizer").is_visible() is (run == "gan")


def test_run_without_the_second_optimizer_chosen_next_shows_its_first(tab):
    tab.open("gan", link="&p.stability.optimizer=1")
    tab.all("#run").select_option("single")
    tab.see(".summary:has-text('step 199')").see(HEATMAP)
    assert "optimizer" not in tab.hash()


def test_comparison_takes_the_first_optimizer_of_a_run_that_has_one(tab, server):
    server.requests.clear()
    tab.open("gan", link="&p.stability.optimizer=1&p.stability.compare=single")
    tab.see(".differences")
    assert ("steps", {"run": "single", "optimizer": "0"}) in server.requests
