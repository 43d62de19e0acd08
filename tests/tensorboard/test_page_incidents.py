"""The verdict, the grouped list of incidents and what an incident says is to do, in a browser."""

import pytest


@pytest.mark.parametrize(
    ("runs", "level", "parts"),
    [
        ("repeated", "act", ["5 times the same bad sample", "To do: fix or remove sample 8 of 16"]),
        ("normal", "act", ["Stopped at step 360", "To do: look at the batch"]),
        ("large", "ok", ["No incidents in 20,000 steps"]),
    ],
)
def test_verdict_says_at_the_top_what_is_to_do(tab, runs, level, parts):
    text = tab.open(runs).text(".verdict")
    assert [part for part in parts if part not in text] == []
    assert tab.all(".verdict").get_attribute("data-level") == level


def test_run_says_whether_it_goes_on(tab):
    tab.open("repeated")
    assert tab.text(".run-status") == "finished at step 500"
    assert tab.all("#run option").all_inner_texts() == ["repeated (6 incidents, finished)"]


def test_equal_incidents_are_one_row_that_unfolds(tab):
    tab.open("repeated")
    rows = tab.all(".incidents tbody tr")
    assert rows.count() == 2
    assert "80 … 400" in rows.first.inner_text()
    assert "in batch 12 of every epoch (index 200 of the data" in rows.first.inner_text()
    tab.all(".incidents .group button").press("Enter")
    assert rows.count() == 7
    tab.all(".incidents .inner button").nth(2).click()
    assert "Incident 3" in tab.text(".detail h2")
    tab.all(".incidents .group button").click()
    assert rows.count() == 2


def test_incident_selected_by_its_address_is_visible_in_its_group(tab):
    tab.open("repeated", link="&p.stability.incident=4")
    tab.see('.incidents tr[data-id="4"][aria-selected="true"]')


def test_column_without_any_value_is_hidden(tab):
    names = ["", "time", "step", "kind", "outcome"]
    assert tab.open("unknown").all(".incidents th").all_inner_texts() == names


def test_list_is_searched_and_sorted(tab):
    tab.open("repeated")
    tab.all(".incidents select").select_option("latest")
    assert "loss spike" in tab.all(".incidents tbody tr").first.inner_text()
    tab.all(".incidents input").fill("SKIPPED loss")
    assert tab.all(".incidents tbody tr").count() == 1
    tab.all(".incidents input").fill("no such word")
    tab.see(".incidents .message:has-text('No incident fits')")


def test_incident_says_first_what_was_done_and_what_to_do_and_has_its_source_lines(tab):
    tab.open("normal", link="&p.stability.incident=1")
    story = tab.text(".story")
    for part in (
        "step retried, step skipped",
        "nothing, it was handled\nSafe to ignore if it came with one batch and did not return. "
        "Otherwise: look at the batch in",
    ):
        assert part in story
    assert tab.text(".source-line.origin") == "87    return safe.log()"
    assert tab.all(".source-line").count() == 3


def test_nothing_overflows_a_narrow_window(tab):
    tab.open("repeated", link="&p.stability.incident=3", width=900)
    tab.all(".keys summary").click()
    for selector in (".detail", ".story", ".keys dl", ".incidents table"):
        box = tab.all(selector).first.bounding_box()
        assert box["x"] >= 0, selector
        assert box["x"] + box["width"] <= 900, selector
