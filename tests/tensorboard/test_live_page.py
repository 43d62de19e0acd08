"""The page in TensorBoard itself, on the main job cut short, while another run goes on (K5, V4)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tensorboard.live import search_path, tensorboard, wait_for

ROOT = Path(__file__).parents[2]
SHORT = ["data.n_train=512", "data.n_val=8", "data.n_test=8", "model.warmup_steps=20"]
SHORT += ["trainer.enable_progress_bar=false", "evaluate=null"]
FAULTS = ["callbacks.faults.faults=[{_target_: lit_stability.faults.NanLoss, step: 60}]"]


def job(experiment, folder, *options):
    """The command of an experiment, cut short."""
    words = ["fit", "-c", experiment, f"run_dir={folder}", *SHORT, *options]
    return [sys.executable, "-m", "lit_stability.cli", *words]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A TensorBoard on a rescued run of 90 steps, and its folder."""
    root = tmp_path_factory.mktemp("runs")
    done = [*job("translation_rescue", root / "rescued", "trainer.max_steps=90"), *FAULTS]
    subprocess.run(done, cwd=ROOT, check=True, capture_output=True)
    path = search_path(tmp_path_factory.mktemp("site"))
    with tensorboard(path, logdir=root, reload_interval=1) as (address, process):
        runs = f"{address}/data/plugin/stability/runs"
        wait_for(runs, process, lambda found: found and found[0]["incidents"])
        yield address, root, process


@pytest.fixture
def page(browser, live):
    page, complaints = browser.new_page(), []
    page.set_viewport_size({"width": 1280, "height": 1200})
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{live[0]}/#stability")
    page.frame_locator("iframe").locator("[data-drawn]").first.wait_for()
    yield page
    page.close()
    assert complaints == []


@pytest.mark.slow
def test_incident_of_the_main_job_is_told_in_tensorboard(page):
    frame = page.frame_locator("iframe")
    cells = frame.locator(".incidents tbody tr").first.inner_text().split("\t")
    assert cells[2:4] == ["60", "non-finite loss"]
    assert "recovered" in cells[-1]
    frame.locator(".incidents tbody button").first.press("Enter")
    frame.locator(".detail").wait_for()
    said = frame.locator(".detail").inner_text()
    for part in ("Incident 1: non-finite loss", "glitch", "step taken again", "torch.load"):
        assert part in said
    assert "p.stability.incident=1" in page.evaluate("location.hash")
    page.evaluate("document.body.classList.add('dark-mode')")
    frame.locator("html.dark .page").wait_for()


@pytest.mark.slow
def test_reload_shows_the_steps_of_a_run_that_goes_on(page, live):
    _, root, process = live
    options = ["trainer.max_steps=2000", "trainer.log_every_n_steps=5"]
    training = subprocess.Popen(
        [*job("translation_rescue", root / "growing", *options), *FAULTS],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    frame = page.frame_locator("iframe")

    def last():
        """The step that the page says, after TensorBoard's own button was pressed."""
        page.locator("app-header-reload button").click()
        page.wait_for_timeout(1500)
        return int(frame.locator(".summary").inner_text().split()[1])

    try:
        runs = f"{live[0]}/data/plugin/stability/runs"
        wait_for(runs, process, lambda found: any(r["run"] == "growing" for r in found))
        page.locator("app-header-reload button").click()
        frame.locator("#run option", has_text="growing").first.wait_for(state="attached")
        frame.locator("#run").select_option("growing")
        first = last()
        assert any(last() > first for _ in range(10))
    finally:
        training.terminate()
        training.wait(timeout=30)
