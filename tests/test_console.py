"""Lines of the suite reach the screen whole, beside progress bars and without a terminal."""

import logging
import os
import sys

import pytest

from lit_stability.console import PREFIX, attach
from tests.programs import Program, run_program
from tests.project import ROOT
from tests.screen import printed_on_a_terminal, rendered
from tests.screen_fits import SEPARATOR

FITS = [*((bar, width) for bar in ("rich", "tqdm") for width in (80, 100, 200)), ("none", 100)]


def arguments(folder, fits):
    return ["-m", "tests.screen_fits", str(folder), *(f"{bar}:{width}" for bar, width in fits)]


def logged(folder):
    """What a handler of the user was given in each fit."""
    fits = (folder / "log.txt").read_text(encoding="utf8").split(SEPARATOR)[1:]
    return [[each.strip("\n") for each in fit.split("\x1f")[:-1]] for fit in fits]


def close(text):
    """The text without white space: a terminal breaks lines where it likes."""
    return "".join(text.split())


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    """Bar and width -> the rows on the screen after a fit, and the records of the user's handler.

    All fits share one process, as most of the time goes into imports.
    """
    folder = tmp_path_factory.mktemp("screens")
    parts = printed_on_a_terminal(arguments(folder, FITS)).split(SEPARATOR.encode())[1:]
    rows = [rendered(data, width) for data, (_, width) in zip(parts, FITS, strict=True)]
    return dict(zip(FITS, zip(rows, logged(folder), strict=True), strict=True))


@pytest.mark.parametrize("fit", FITS)
def test_every_line_is_whole_beside_a_progress_bar(fit, screens):
    rows, records = screens[fit]
    on_screen = close("\n".join(rows))
    assert len(records) > 3
    assert [each for each in records if close(each) not in on_screen] == []


@pytest.mark.parametrize("fit", FITS)
def test_no_line_is_glued_to_a_progress_bar(fit, screens):
    rows, records = screens[fit]
    starts = [row for row in rows if PREFIX in row]
    assert len(starts) == len(records), "each record is printed once, and given once to others"
    assert all(row.startswith(PREFIX) for row in starts)


@pytest.mark.parametrize("fit", FITS)
def test_summary_is_below_the_progress_bar(fit, screens):
    rows, records = screens[fit]
    screen = close("\n".join(rows))
    assert screen.endswith(close(records[-1]))


def test_lines_without_a_terminal_are_those_of_the_log(tmp_path):
    command = [sys.executable, *arguments(tmp_path, [("rich", 80)])]
    done = run_program(command, folder=tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (records,) = logged(tmp_path)
    assert [each for each in records if each not in done.stderr] == []
    assert PREFIX not in done.stdout


@pytest.mark.long
def test_lines_for_a_file_do_not_go_to_the_terminal_of_the_bar(tmp_path):
    """As with `python train.py 2> errors.txt`: rich would print them above its bar."""
    errors = tmp_path / "errors.txt"
    with errors.open("w") as file:
        shown = printed_on_a_terminal(arguments(tmp_path, [("rich", 80)]), stderr=file)
    assert PREFIX.encode() not in shown
    (records,) = logged(tmp_path)
    assert [each for each in records if each not in errors.read_text(encoding="utf8")] == []


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self, level=logging.NOTSET):
        super().__init__(level)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_handlers_of_all_loggers_above_get_each_record_once_by_their_level():
    own, parent = logging.getLogger("screen.test.own"), logging.getLogger("screen.test")
    handlers = {name: Kept(level) for name, level in (("all", 0), ("errors", 40), ("own", 0))}
    attach(attach(own))
    own.setLevel(logging.INFO)
    parent.propagate = False
    own.addHandler(handlers["own"])
    parent.addHandler(handlers["all"])
    parent.addHandler(handlers["errors"])
    own.info("%d steps", 3)
    own.error("over")
    first, second = f"{PREFIX} 3 steps", f"{PREFIX} over"
    assert handlers["all"].lines == handlers["own"].lines == [first, second]
    assert handlers["errors"].lines == [second]


NOTEBOOK = """
import logging
import sys
from pathlib import Path
for handler in logging.getLogger("lightning.pytorch").handlers:
    handler.setStream(sys.stderr)  # as if Lightning were imported here for the first time
from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import fit
logging.getLogger("lightning.pytorch").addHandler(logging.FileHandler("log.txt"))
faults = FaultInjector([NanLoss(step=12), NanLoss(step=40, steps=2)])
fit(Path("."), [faults, *stability_callbacks()], max_steps=60);
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_incident_is_one_card_in_a_notebook_and_lines_in_the_users_file(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setattr("jupyter_client.launcher.Popen", Program)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbclient.NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = book.cells[0].outputs
    cards = [each.data["text/html"] for each in outputs if each.output_type == "display_data"]
    assert [card.count("Incident 1 at step 12") for card in cards] == [1, 0]
    assert all("recovered at step " in card for card in cards), "each is drawn again when it closes"
    printed = "".join(each.text for each in outputs if each.output_type == "stream")
    assert "[stability] watching" in printed
    assert "[stability] incident" not in printed
    assert (tmp_path / "log.txt").read_text().count("[stability] incident 1 ") == 2
