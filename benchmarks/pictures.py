"""Takes the README's screenshots of the Stability tab.

    lit-stability fit -c translation_rescue && python -m benchmarks.pictures runs

Needs ``chromium`` in the PATH and ``pip install playwright pillow``. The argument is a folder with
a run of `configs/translation_rescue.yaml`; the pictures are written to ``notebooks/pictures``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from tensorboard import default, program

from lit_stability.tensorboard.loader import StabilityLoader

FOLDER = Path(__file__).parents[1] / "notebooks" / "pictures"
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
RUN = "translation_rescue"
SHOTS = {"stability_light": ("&p.stability.incident=2", False), "stability_dark": ("", True)}
"""Name of a picture -> what its link adds to that of the run, and whether it is dark."""


def serve(folder: Path) -> str:
    """Starts TensorBoard in this process and returns its address."""
    board = program.TensorBoard(plugins=[*default.get_static_plugins(), StabilityLoader])
    board.configure(argv=["", f"--logdir={folder}", "--port=0", "--load_fast=false"])
    return board.launch()


def newest_run(folder: Path) -> str:
    """Returns the name of the latest run of the job, as TensorBoard lists it."""
    files = sorted((folder / RUN).rglob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime)
    return files[-1].parent.relative_to(folder).as_posix()


def shoot(page: Page, address: str, run: str, name: str) -> Path:
    """Takes one screenshot and returns its path."""
    link, dark = SHOTS[name]
    page.goto("about:blank")
    page.goto(f"{address}#stability&p.stability.run={quote(run, safe='')}{link}")
    frame = page.frame_locator("iframe")
    frame.locator("[data-drawn]").first.wait_for()
    if dark:
        page.evaluate("document.body.classList.add('dark-mode')")
        frame.locator("html.dark .page").wait_for()
    page.wait_for_timeout(1500)
    path = FOLDER / f"{name}.png"
    page.screenshot(path=path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256)
    small.save(path, optimize=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    folder = parser.parse_args().runs
    if not (folder / RUN).is_dir():
        parser.error(f"{folder} has no {RUN}; run: lit-stability fit -c {RUN}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    address, run = serve(folder), newest_run(folder)
    with sync_playwright() as p, tempfile.TemporaryDirectory() as profile:
        browser = p.chromium.launch_persistent_context(
            profile,
            executable_path=shutil.which("chromium"),
            args=BROWSER,
            viewport={"width": 1440, "height": 1240},
        )
        for name in SHOTS:
            print(shoot(browser.pages[0], address, run, name))
        browser.close()


if __name__ == "__main__":
    main()
