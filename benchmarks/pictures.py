"""Takes the README's screenshots of the Stability tab.

    lit-stability fit -c translation_rescue && python -m benchmarks.pictures runs

Needs ``chromium`` in the PATH and ``pip install playwright``. The argument is a folder of runs with
a run of `configs/translation_rescue.yaml`; the pictures are written to ``notebooks/pictures``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from tensorboard import default, program

from lit_stability.tensorboard.loader import StabilityLoader

FOLDER = Path(__file__).parents[1] / "notebooks" / "pictures"
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
RUN = "translation_rescue"
SHOTS = {
    "stability_light": (f"&p.stability.run={RUN}&p.stability.incident=2", False),
    "stability_dark": (f"&p.stability.run={RUN}", True),
}


def serve(folder: Path) -> str:
    """Starts TensorBoard in this process and returns its address."""
    board = program.TensorBoard(plugins=[*default.get_static_plugins(), StabilityLoader])
    board.configure(argv=["", f"--logdir={folder}", "--port=0", "--load_fast=false"])
    return board.launch()


def shoot(page: Page, address: str, name: str) -> Path:
    """Takes one screenshot and returns its path."""
    link, dark = SHOTS[name]
    page.goto("about:blank")
    page.goto(f"{address}#stability{link}")
    frame = page.frame_locator("iframe")
    frame.locator("[data-drawn]").first.wait_for()
    if dark:
        page.evaluate("document.body.classList.add('dark-mode')")
        frame.locator("html.dark .page").wait_for()
    page.wait_for_timeout(1500)
    path = FOLDER / f"{name}.png"
    page.screenshot(path=path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    folder = parser.parse_args().runs
    if not (folder / RUN).is_dir():
        parser.error(f"{folder} has no {RUN}; run: lit-stability fit -c {RUN}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    address = serve(folder)
    with sync_playwright() as p, tempfile.TemporaryDirectory() as profile:
        browser = p.chromium.launch_persistent_context(
            profile,
            executable_path=shutil.which("chromium"),
            args=BROWSER,
            viewport={"width": 1440, "height": 1240},
        )
        for name in SHOTS:
            print(shoot(browser.pages[0], address, name))
        browser.close()


if __name__ == "__main__":
    main()
