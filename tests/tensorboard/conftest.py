"""A browser and a server for the tests of the page; without a browser they are skipped."""

import shutil
import tempfile

import pytest

from tests.tensorboard.page_server import PageServer
from tests.tensorboard.page_tab import ARGS, Tab


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a chromium in the PATH to draw with: apt-get install chromium")
    with playwright.sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        context = p.chromium.launch_persistent_context(folder, executable_path=chromium, args=ARGS)
        context.set_default_timeout(8000)
        yield context
        context.close()


@pytest.fixture(scope="session")
def server():
    server = PageServer()
    yield server
    server.close()


@pytest.fixture
def tab(browser, server):
    tab = Tab(browser, server)
    yield tab
    tab.page.close()
    assert tab.complaints == []


@pytest.fixture
def loud(browser, server):
    """A tab in which a failed request is expected."""
    tab = Tab(browser, server)
    yield tab
    tab.page.close()
    assert [c for c in tab.complaints if "404" not in c] == []
