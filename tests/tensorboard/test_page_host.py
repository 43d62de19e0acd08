"""The Stability tab in its frame: address, light, reload, what has no data, what is hostile."""

import re

import pytest

from tests.tensorboard.page_runs import MARKUP
from tests.tensorboard.page_server import STATIC
from tests.tensorboard.page_tab import HEATMAP, TIMELINE


def test_link_opens_run_incident_stretch_and_comparison(tab):
    link = "&p.stability.run=translation&p.stability.compare=twin&p.stability.incident=3"
    tab.open(link=link + "&p.stability.from=350&p.stability.to=450")
    assert "Incident 3" in tab.text(".detail h2")
    tab.see(".differences")
    assert "step 400" in tab.hover(TIMELINE, 400, shown=(350, 450))
    assert tab.range() == (350, 450)


def test_link_followed_later_changes_what_is_shown(tab):
    tab.open()
    tab.page.evaluate("location.hash = 'stability&p.stability.incident=2'")
    tab.see(".detail h2:has-text('Incident 2')")
    assert "Incident 2" in tab.text(".detail h2")


def test_back_returns_to_the_incident_before_and_past_zooming(tab):
    tab.open(link="&p.stability.run=translation&p.stability.incident=1")
    tab.all('.detail button[aria-label="Next incident"]').click()
    tab.see(".detail h2:has-text('Incident 2')")
    tab.all(TIMELINE).focus()
    tab.page.keyboard.press("+")
    tab.page.go_back()
    tab.see(".detail h2:has-text('Incident 1')")
    assert tab.range() is None


def test_link_that_leads_nowhere_is_mended_and_not_come_back_to(tab):
    tab.open(link="&p.stability.run=gone&p.stability.incident=9")
    assert tab.hash() == "#stability&p.stability.run=translation"
    assert tab.page.evaluate("history.length") == 2, "about:blank and this one"


def test_other_tab_in_front_keeps_its_address(tab):
    tab.open()
    tab.page.evaluate("history.replaceState(null, '', '#scalars')")
    tab.all(".incidents tbody button").first.press("Enter")
    assert tab.hash() == "#scalars"


@pytest.mark.parametrize("dark", [False, True])
def test_host_that_turns_dark_turns_the_page(tab, dark):
    tab.open(dark=dark)
    background = "getComputedStyle(document.body).backgroundColor"
    read = lambda: tab.all("body").evaluate(background)  # noqa: E731
    light, night = "rgb(255, 255, 255)", "rgb(48, 48, 48)"
    assert read() == (night if dark else light)
    before = tab.pixels(TIMELINE)
    tab.page.evaluate("document.body.classList.toggle('dark-mode')")
    tab.see("html" if dark else "html.dark")
    assert read() == (light if dark else night)
    assert tab.pixels(TIMELINE) != before


def test_page_alone_is_dark_where_the_system_is(browser, server):
    page = browser.new_page()
    page.emulate_media(color_scheme="dark")
    page.goto(f"{server.url}data/plugin_entry.html")
    page.locator("html.dark .page").wait_for()
    color = page.evaluate("getComputedStyle(document.querySelector('.page')).color")
    page.close()
    assert min(map(int, re.findall(r"\d+", color)[:3])) > 128, "light text"


def test_host_that_has_reloaded_is_answered_and_data_fetched_again(tab, server):
    tab.open(link="&p.stability.incident=2&p.stability.from=100&p.stability.to=300")
    server.requests.clear()
    tab.page.evaluate("reloadData()")
    tab.page.wait_for_function("window.answered")
    assert tab.page.evaluate("[answered.id, answered.isReply]") == [7, True]
    tab.page.wait_for_timeout(300)
    routes = sorted(route for route, _ in server.requests)
    assert routes == ["incidents", "runs", "steps", "verdict"], (
        "layers are not fetched again until a step arrives"
    )
    assert "Incident 2" in tab.text(".detail h2")
    assert tab.range() == (100, 300)


def test_markup_in_names_stays_text(tab):
    tab.open("markup", link="&p.stability.incident=1")
    y = tab.row('[data-group*="img"]')
    assert MARKUP in tab.hover(HEATMAP, 20, y=y, shown=(0, 199))
    assert MARKUP in tab.text(".detail .headline")
    assert MARKUP in tab.text(".incidents tbody")
    assert tab.all("img").count() == 0
    assert tab.page.evaluate("window.faulty") is None


def test_no_run_says_what_to_add(tab):
    tab.open("empty", state="empty")
    text = tab.text(".page-message")
    assert "No run with stability data" in text
    assert "Add GradientMonitor() to Trainer(callbacks=...) and a TensorBoardLogger" in text


def test_run_without_a_step_says_that_it_has_only_begun(tab):
    tab.open(link="&p.stability.run=begun", state="ready", drawn=False)
    assert "No step of this run has been written yet" in tab.text(".page-message")


def test_run_that_cannot_be_read_says_why_what_to_do_and_tries_again(loud, server):
    loud.open("broken", state="error")
    assert "no run 'broken'" in loud.text(".page-message")
    assert "look at the log directory" in loud.text(".page-message")
    server.requests.clear()
    loud.all('button:text("Try again")').click()
    loud.page.wait_for_timeout(200)
    assert "steps" in [route for route, _ in server.requests]


@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize("incident", ["", "&p.stability.incident=1"])
def test_page_is_never_wider_than_its_frame(tab, width, incident):
    tab.open(link=incident, width=width)
    for part in ("html", "main", ".detail"):
        wide = tab.all(part).evaluate("each => each.scrollWidth - each.clientWidth")
        assert wide <= 0, part


def test_every_control_has_a_name_and_can_be_focused(tab):
    tab.open(link="&p.stability.incident=1")
    names = """all => all.map((each) => each.labels?.[0]?.textContent
      || each.getAttribute("aria-label") || each.textContent)"""
    found = tab.all("button, select, [tabindex='0']").evaluate_all(names)
    assert len(found) > 15
    assert all(name.strip() for name in found)


def test_static_files_name_no_other_host_and_parse_no_markup():
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf8")
        assert len(text.splitlines()) <= 300, file
        for word in ("innerHTML", "insertAdjacentHTML", "http://", "https://", "eval("):
            assert word not in text, (file, word)
