"""The Stability tab as somebody sees it: in a browser, in TensorBoard's frame (K5, V4)."""

import re
import shutil
import tempfile
import time

import pytest

from tests.tensorboard.page_runs import MARKUP, NAN_AT, RATE_AT, WEIGHT_AT
from tests.tensorboard.page_server import STATIC, PageServer

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in the PATH to draw with")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGS += ["--headless", "--disable-background-networking", "--disable-component-update"]
TIMELINE, HEATMAP, WINDOW = ".timeline .plot", ".heatmap .plot", ".detail .plot"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        context = p.chromium.launch_persistent_context(folder, executable_path=CHROMIUM, args=ARGS)
        context.set_default_timeout(8000)
        yield context
        context.close()


@pytest.fixture(scope="module")
def server():
    server = PageServer()
    yield server
    server.close()


class Tab:
    """A host window with the tab in it, and what the browser complained about."""

    def __init__(self, browser, server):
        self.page, self.url, self.complaints = browser.new_page(), server.url, []
        self.frame = self.page.frame_locator("iframe")
        self.page.on("console", self.listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def listen(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, runs="normal", link="", dark=False, state="ready", drawn=True, width=1280):
        self.page.set_viewport_size({"width": width, "height": 1500})
        query = f"?set={runs}" + ("&dark=1" if dark else "")
        self.page.goto(f"{self.url}{query}#stability{link}")
        self.see(f'.page[data-state="{state}"]')
        if state == "ready" and drawn:
            self.see("[data-drawn]")
        return self

    def see(self, selector):
        self.frame.locator(selector).first.wait_for()
        return self

    def gone(self, selector):
        self.frame.locator(selector).first.wait_for(state="hidden")
        return self

    def all(self, selector):
        return self.frame.locator(selector)

    def text(self, selector):
        return self.frame.locator(selector).first.inner_text()

    def hash(self):
        return self.page.evaluate("location.hash")

    def px(self, plot, attempt, shown=(0, 499)):
        """Where an attempt lies, in the plot's own pixels; the gutters are the page's."""
        width = self.all(plot).bounding_box()["width"]
        left = 236 if width > 900 else 136
        return left + (attempt - shown[0]) / (shown[1] - shown[0]) * (width - 26 - left)

    def hover(self, plot, attempt, y=60, shown=(0, 499)):
        self.all(plot).hover(position={"x": self.px(plot, attempt, shown), "y": y})
        return self.see(f"{plot} .tooltip").text(f"{plot} .tooltip")

    def row(self, name):
        """Height of the middle of a named row in the heat map."""
        box = self.all(name).first.bounding_box()
        return box["y"] - self.all(HEATMAP).bounding_box()["y"] + min(box["height"], 11) / 2

    def pixels(self, plot):
        """A picture of a plot, to be compared with another."""
        return self.all(f"{plot} canvas").first.evaluate("canvas => canvas.toDataURL()")

    def range(self):
        """First and last attempt in view as the address says, None for all."""
        found = re.search(r"p\.stability\.from=(\d+)&p\.stability\.to=(\d+)", self.hash())
        return found and tuple(map(int, found.groups()))


@pytest.fixture
def tab(browser, server):
    tab = Tab(browser, server)
    yield tab
    tab.page.close()
    assert tab.complaints == []


@pytest.fixture
def loud(browser, server):
    """A tab in which a failed request is to be expected."""
    tab = Tab(browser, server)
    yield tab
    tab.page.close()
    assert [c for c in tab.complaints if "404" not in c] == []


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
    ("attempt", "said"),
    [
        (20, ["attempt 20 · step 20", "gradient norm", "effective LR", "2^16", "16-mixed"]),
        (NAN_AT, ["attempt 150", "NaN", "Incident 1: non-finite loss", "Vetoed"]),
        (WEIGHT_AT - 5, ["Taken back by the rollback of incident 2"]),
        (WEIGHT_AT + 20, ["LR factor", "÷2", "2^15"]),
        (RATE_AT + 5, ["÷99", "bf16-mixed"]),
    ],
)
def test_timeline_hovered_reads_the_values_of_that_attempt(tab, attempt, said):
    told = tab.open().hover(TIMELINE, attempt)
    assert [part for part in said if part not in told] == []


def test_timeline_dragged_over_shows_that_stretch_and_double_click_shows_all(tab):
    tab.open()
    box = tab.all(TIMELINE).bounding_box()
    x = [box["x"] + tab.px(TIMELINE, attempt) for attempt in (100, 300)]
    tab.page.mouse.move(x[0], box["y"] + 80)
    tab.page.mouse.down()
    tab.page.mouse.move(x[1], box["y"] + 90, steps=3)
    tab.page.mouse.up()
    first, last = tab.range()
    assert abs(first - 100) <= 2
    assert abs(last - 300) <= 2
    assert "attempt 200" in tab.hover(TIMELINE, 200, shown=tab.range())
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
    assert last - first < 499 * 0.7
    assert (400 - first) / (last - first) == pytest.approx(400 / 499, abs=0.02)


def test_keyboard_zooms_pans_and_reads_values(tab):
    tab.open().all(TIMELINE).focus()
    tab.page.keyboard.press("+")
    first, last = tab.range()
    assert (last - first) == pytest.approx(499 / 2, abs=2)
    tab.page.keyboard.press("ArrowRight")
    assert tab.range()[0] > first
    tab.page.keyboard.press("0")
    assert tab.range() is None
    tab.page.keyboard.press("Shift+ArrowRight")
    tab.page.keyboard.press("Shift+ArrowRight")
    assert "attempt 1 ·" in tab.text(f"{TIMELINE} .tooltip")


def test_scale_switched_to_linear_redraws_the_timeline(tab):
    before = tab.open().pixels(TIMELINE)
    tab.all('.timeline button:text-is("linear")').click()
    assert tab.all('.timeline button[aria-pressed="true"]').inner_text() == "linear"
    assert tab.pixels(TIMELINE) != before


def test_pin_clicked_opens_the_detail_of_its_incident(tab):
    tab.open().all(TIMELINE).click(position={"x": tab.px(TIMELINE, WEIGHT_AT), "y": 13})
    tab.see(".detail header")
    assert "Incident 2: non-finite weight" in tab.text(".detail header")
    assert "p.stability.incident=2" in tab.hash()


def test_detail_tells_origin_causes_what_was_tried_and_how_to_load_the_scene(tab):
    """S15, V5: where it was born, what to try, when to leave it alone."""
    tab.open(link="&p.stability.incident=1")
    told = tab.text(".detail")
    for part in (
        "attention.py:87, forward pass",
        "log made nan",
        "/home/ada/translate/models/attention.py:87",
        "weights float16[8, 4, 64, 64] in [-0.0012, 1]",
        "operation outside its domain",
        "Try: clamp the argument",
        "Leave it alone: if it came with one batch",
        "step taken again",
        "It returned when the same steps were taken again.",
        "runs/translation/incidents/00000150-1",
    ):
        assert part in told
    causes = tab.all(".causes > li strong:first-child").all_inner_texts()
    assert [causes[0], causes[3]] == ["operation outside its domain", "bad batch"]
    compile(tab.text(".code pre"), "scene", "exec")
    assert 'torch.load(folder / "scene.pt"' in tab.text(".code pre")


def test_detail_reads_every_step_around_the_incident(tab):
    tab.open(link="&p.stability.incident=2")
    box = tab.all(WINDOW).bounding_box()
    left, right = 64, box["width"] - 20
    middle = left + (WEIGHT_AT - 200.5) / 81 * (right - left)
    tab.all(WINDOW).hover(position={"x": middle, "y": 60})
    assert "attempt 251" in tab.text(f"{WINDOW} .tooltip")
    tab.all(".detail summary").first.click()
    assert tab.all(".detail tbody tr.vetoed td").first.inner_text() == str(WEIGHT_AT)
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


def test_heatmap_hovered_tells_layer_value_and_ratio_to_its_median(tab):
    """S8: layer by layer, on a logarithmic scale."""
    tab.open()
    told = tab.hover(HEATMAP, RATE_AT + 1, y=tab.row('[data-group="decoder.layers.1"]'))
    assert "network.decoder.layers.1.self_attention.query.weight" in told
    ratio = float(re.search(r"ratio\s*×([\d.]+)", told)[1])
    assert ratio > 20
    assert "NaN" in tab.hover(HEATMAP, NAN_AT, y=tab.row('[data-group="encoder.layers.0"]'))


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
    told = tab.hover(HEATMAP, NAN_AT, y=tab.row('[data-group="encoder.layers.1"]'))
    assert "NaN" in told
    assert "The most striking of 4 layers" in told


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
    assert canvas.evaluate(colours, [tab.px(HEATMAP, NAN_AT) - 4, top - 9, 8, 8]) > 1
    assert canvas.evaluate(colours, [tab.px(HEATMAP, 300), top - 9, 8, 8]) == 1


def test_quantity_switched_reads_the_update_ratio_and_says_where_there_is_none(tab, server):
    tab.open(link="&p.stability.run=twin")
    tab.all('button:text-is("update-to-weight ratio")').first.click()
    tab.see(".heatmap .message:has-text('No update-to-weight ratios')").gone(HEATMAP)
    assert ("layers", {"run": "twin", "quantity": "update_ratio"}) in server.requests
    tab.all('button:text-is("gradient norm")').click()
    tab.see(HEATMAP)


def test_run_switched_shows_the_other_run_and_writes_it_into_the_address(tab):
    tab.open().all("#run").select_option("twin")
    tab.see(".incidents .message:has-text('No incident in this run')")
    assert "step 469" in tab.text(".summary")
    assert "p.stability.run=twin" in tab.hash()


def test_comparison_lays_two_runs_over_each_other_by_step(tab):
    tab.open().all("#other").select_option("twin")
    tab.see(".comparison .plot")
    assert "no incident" in tab.text(".comparison .legend")
    plot = ".comparison .plot"
    told = tab.hover(plot, 300, shown=(0, 476))
    assert re.search(r"loss\s+[\d.]+ \| [\d.]+ \([×÷][\d.]+\)", told)
    assert "p.stability.compare=twin" in tab.hash()
    tab.all("#other").select_option("")
    tab.gone(".comparison")


def test_link_opens_run_incident_stretch_and_comparison(tab):
    link = "&p.stability.run=translation&p.stability.compare=twin&p.stability.incident=3"
    tab.open(link=link + "&p.stability.from=350&p.stability.to=450")
    assert "Incident 3" in tab.text(".detail h2")
    tab.see(".comparison .plot")
    assert "attempt 400" in tab.hover(TIMELINE, 400, shown=(350, 450))
    assert tab.range() == (350, 450)


def test_link_followed_later_changes_what_is_shown(tab):
    tab.open()
    tab.page.evaluate("location.hash = 'stability&p.stability.incident=2'")
    tab.see(".detail h2:has-text('Incident 2')")


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
    page.close()


def test_host_that_has_reloaded_is_answered_and_data_fetched_again(tab, server):
    tab.open(link="&p.stability.incident=2&p.stability.from=100&p.stability.to=300")
    server.requests.clear()
    tab.page.evaluate("reloadData()")
    tab.page.wait_for_function("window.answered")
    assert tab.page.evaluate("[answered.id, answered.isReply]") == [7, True]
    tab.page.wait_for_timeout(300)
    routes = [route for route, _ in server.requests]
    assert routes == ["runs", "steps", "incidents"], "layers are left alone while no step has come"
    assert "Incident 2" in tab.text(".detail h2")
    assert tab.range() == (100, 300)


def test_markup_in_names_stays_text(tab):
    tab.open("markup", link="&p.stability.incident=1")
    y = tab.row('[data-group*="img"]')
    assert MARKUP in tab.hover(HEATMAP, 20, y=y, shown=(0, 199))
    assert MARKUP in tab.text(".detail .headline")
    assert MARKUP in tab.text(".incidents tbody")
    assert tab.all("img").count() == 0
    assert tab.page.evaluate("window.struck") is None


def test_no_run_says_what_to_add(tab):
    tab.open("empty", state="empty")
    told = tab.text(".page-message")
    assert "No run with stability data" in told
    assert "Add GradientMonitor() to Trainer(callbacks=...) and a TensorBoardLogger" in told


def test_run_without_a_step_says_that_it_has_only_begun(tab):
    tab.open(link="&p.stability.run=begun", state="ready", drawn=False)
    assert "No step of this run was written yet" in tab.text(".page-message")


def test_run_that_cannot_be_read_says_why_what_to_do_and_tries_again(loud, server):
    loud.open("broken", state="error")
    assert "no run 'broken'" in loud.text(".page-message")
    assert "look at the log directory" in loud.text(".page-message")
    server.requests.clear()
    loud.all('button:text("Try again")').click()
    loud.page.wait_for_timeout(200)
    assert "steps" in [route for route, _ in server.requests]


def test_twenty_thousand_steps_of_three_hundred_layers_draw_in_four_seconds(tab, server):
    """The server has its answers ready: what is timed is the page, from click to picture."""
    server.warm("large")
    started = time.perf_counter()
    tab.open("large")
    assert time.perf_counter() - started < 4
    tab.all('button:text-is("Fold all")').click()
    assert tab.all(".group-name").count() == 25


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
