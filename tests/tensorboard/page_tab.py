"""The tab in a browser: opened, looked at, and what the browser complained about."""

import re

from tests.tensorboard.page_runs import LAST

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGS += ["--headless", "--disable-background-networking", "--disable-component-update"]
TIMELINE, HEATMAP, WINDOW = ".timeline .plot", ".heatmap .plot", ".detail .plot"


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

    def px(self, plot, step, shown=(0, LAST)):
        """Where a step lies, in the plot's own pixels; the gutters are the page's."""
        width = self.all(plot).bounding_box()["width"]
        left = 236 if width > 900 else 160
        return left + (step - shown[0]) / (shown[1] - shown[0]) * (width - 26 - left)

    def hover(self, plot, step, y=60, shown=(0, LAST)):
        self.all(plot).hover(position={"x": self.px(plot, step, shown), "y": y})
        return self.see(f"{plot} .tooltip").text(f"{plot} .tooltip")

    def row(self, name):
        """Height of the middle of a named row in the heat map."""
        box = self.all(name).first.bounding_box()
        return box["y"] - self.all(HEATMAP).bounding_box()["y"] + min(box["height"], 11) / 2

    def pixels(self, plot):
        """A picture of a plot, to be compared with another."""
        return self.all(f"{plot} canvas").first.evaluate("canvas => canvas.toDataURL()")

    def range(self):
        """First and last step in view as the address says, None for all."""
        found = re.search(r"p\.stability\.from=(\d+)&p\.stability\.to=(\d+)", self.hash())
        return found and tuple(map(int, found.groups()))
