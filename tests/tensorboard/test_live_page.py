"""The page in TensorBoard itself, on real runs, one of which goes on meanwhile (K5, V4)."""

import re
import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback

from lit_stability import GradientMonitor
from lit_stability.tensorboard.layout import LAYOUT
from tests.tensorboard.live import search_path, tensorboard, wait_for
from tests.tensorboard.live_runs import FAULT_AT, MARKUP, STEPS, train, write_runs
from tests.tensorboard.page_tab import HEATMAP, TIMELINE, Tab

pytestmark = pytest.mark.slow
RELOAD = "app-header-reload button"


class LiveTab(Tab):
    """The tab in TensorBoard's own window."""

    def open(self, link=""):
        self.page.set_viewport_size({"width": 1280, "height": 1200})
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}/#stability{link}")
        return self.see('.page[data-state="ready"]').see("[data-drawn]")

    def hover(self, plot, attempt, y=60, shown=(1, STEPS + 1)):
        return super().hover(plot, attempt, y, shown)

    def attempt_at(self, x):
        """The attempt whose values are read at a pixel of the time line."""
        self.all(TIMELINE).hover(position={"x": x, "y": 60})
        return int(re.search(r"attempt (\d+)", self.text(f"{TIMELINE} .tooltip"))[1])


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A TensorBoard on real runs, and their folder."""
    root = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_runs(root)
    path = search_path(tmp_path_factory.mktemp("site"))
    with tensorboard(path, logdir=root, reload_interval=1) as (address, process):
        runs = f"{address}/data/plugin/stability/runs"
        wait_for(runs, process, lambda found: {"main", "twin"} <= {each["run"] for each in found})
        yield SimpleNamespace(url=address, root=root)


@pytest.fixture
def tab(browser, live):
    tab = LiveTab(browser, live)
    yield tab
    tab.page.close()
    assert [c for c in tab.complaints if "Three.js" not in c] == []


@pytest.mark.long
def test_incident_of_the_main_job_is_shown(tab):
    tab.open("&p.stability.run=main")
    cells = tab.text(".incidents tbody tr").split("\t")
    assert cells[2:4] == ["60", "non-finite loss"]
    assert "recovered" in cells[-1]
    tab.all(".incidents tbody button").first.press("Enter")
    text = tab.see(".detail").text(".detail")
    for part in ("Incident 1: non-finite loss", "glitch", "step retried", "torch.load"):
        assert part in text
    assert "p.stability.incident=1" in tab.hash()


def test_stretch_dragged_over_is_shown_step_by_step(tab):
    tab.open("&p.stability.run=faulty")
    before, far = tab.pixels(HEATMAP), tab.attempt_at(630) - tab.attempt_at(600)
    box = tab.all(TIMELINE).bounding_box()
    edges = [tab.px(TIMELINE, FAULT_AT + by, (0, STEPS - 1)) for by in (-10, 12)]
    tab.page.mouse.move(box["x"] + edges[0], box["y"] + 80)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + edges[1], box["y"] + 90, steps=3)
    tab.page.mouse.up()
    first, last = tab.range()
    assert (abs(first - FAULT_AT + 10) <= 1, abs(last - FAULT_AT - 12) <= 1) == (True, True)
    assert tab.attempt_at(630) - tab.attempt_at(600) <= 1 < far
    assert tab.pixels(HEATMAP) != before
    assert "Rejected" in tab.hover(TIMELINE, FAULT_AT, shown=(first, last))


@pytest.mark.long
def test_keyboard_zooms_and_shows_all_again(tab):
    tab.open("&p.stability.run=faulty").all(HEATMAP).focus()
    for _ in range(3):
        tab.page.keyboard.press("+")
    first, last = tab.range()
    assert last - first == pytest.approx(STEPS / 8, abs=1)
    tab.page.keyboard.press("ArrowRight")
    assert tab.range()[0] > first
    tab.page.keyboard.press("0")
    assert tab.range() is None


def test_run_switched_and_compared_with_its_twin(tab):
    """S17: after the rescue the run is its twin, to the digit."""
    tab.open("&p.stability.run=main").all("#run").select_option("faulty")
    tab.see(f".summary:has-text('step {STEPS - 1}')")
    tab.all("#other").select_option("twin")
    tab.see(".differences")
    text = tab.hover(TIMELINE, FAULT_AT + 50, shown=(0, STEPS - 1))
    loss, other = re.search(r"loss\s+([\d.]+) \| ([\d.]+)", text).groups()
    assert loss == other
    assert "p.stability.run=faulty&p.stability.compare=twin" in tab.hash()


def test_link_opens_run_incident_and_stretch_and_back_returns(tab):
    link = "&p.stability.run=faulty&p.stability.incident=1&p.stability.quantity=update_ratio"
    link += "&p.stability.from=150&p.stability.to=250"
    tab.open(link)
    assert "Incident 1" in tab.text(".detail h2")
    assert tab.range() == (150, 250)
    tab.see(f'{HEATMAP}[data-drawn="update_ratio"]')
    assert f"step {FAULT_AT} " in tab.hover(TIMELINE, FAULT_AT, shown=(150, 250))
    tab.all("#run").select_option("twin")
    tab.see(".incidents .message:has-text('No incident in this run')")
    tab.page.go_back()
    tab.see(".detail h2:has-text('Incident 1')")
    assert tab.hash() == f"#stability{link}"
    tab.page.go_forward()
    tab.see(".incidents .message:has-text('No incident in this run')").gone(".detail")


@pytest.mark.long
def test_optimizers_of_a_run_are_separate(tab):
    tab.open("&p.stability.run=gan")
    assert tab.all("#optimizer option").all_inner_texts() == ["0: generator", "1: critic"]
    assert tab.attempt_at(600) % 2 == 1
    tab.all("#optimizer").select_option("1")
    tab.see('.page[data-state="ready"]').see(f"{HEATMAP} [data-group=weight]")
    assert tab.attempt_at(600) % 2 == 0


@pytest.mark.long
def test_markup_in_the_name_of_a_layer_stays_text(tab):
    tab.open("&p.stability.run=hostile&p.stability.incident=1")
    text = tab.hover(HEATMAP, 30, y=tab.row('[data-group*="img"]'), shown=(1, 61))
    assert MARKUP in text
    assert tab.all("img").count() == 0
    assert tab.all("body").evaluate("() => window.faulty ?? window.parent.faulty") is None


def test_dark_mode_of_tensorboard_darkens_the_page(tab):
    tab.open()
    light = tab.pixels(TIMELINE)
    tab.page.locator("app-header-dark-mode-toggle button").click()
    tab.page.locator('[role="menuitem"]:has-text("Dark")').click()
    tab.see("html.dark")
    assert tab.pixels(TIMELINE) != light
    assert tab.all("body").evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(48, 48, 48)"


class Watched(Callback):
    """Presses TensorBoard's reload button while training goes on, and reads what the page says."""

    def __init__(self, tab, steps):
        self.tab, self.steps, self.seen = tab, steps, []

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step not in self.steps:
            return
        trainer.logger.experiment.flush()
        for _ in range(20):
            self.tab.page.locator(RELOAD).click()
            self.tab.page.wait_for_timeout(400)
            if f"step {trainer.global_step - 1} " in self.tab.text(".summary"):
                break
            if self.tab.all('#run option[value="growing"]').count():
                self.tab.all("#run").select_option("growing")
        self.seen.append(self.tab.text(".summary").split(" · ")[0])


@pytest.mark.filterwarnings("ignore")
def test_reload_shows_the_steps_of_a_run_that_goes_on(tab, live):
    tab.open()
    watched = Watched(tab, (20, 50))
    train(live.root, "growing", [GradientMonitor(), watched])
    assert watched.seen == ["step 19", "step 49"]


def test_those_without_the_plugin_find_incidents_as_text_and_the_layout_of_scalars(tab):
    tab.page.set_viewport_size({"width": 1280, "height": 1200})
    tab.page.goto(f"{tab.url}/#text")
    tab.page.locator("h2:text-is('Incident 1')").first.wait_for()
    items = tab.page.locator("td ul > li strong").all_inner_texts()
    assert {"what", "origin", "outcome"} <= {*items}
    cause = tab.page.locator("td ol > li", has=tab.page.locator("strong")).first
    assert cause.locator("ul > li").count() == 2
    tab.page.goto(f"{tab.url}/#custom_scalars")
    for title in LAYOUT["stability"]:
        tab.page.get_by_text(title, exact=True).first.wait_for()
    card = tab.page.locator("tf-custom-scalar-multi-line-chart-card", has_text="update / weight")
    card.get_by_text(re.compile(r"Matches \([1-9]\)")).wait_for()
