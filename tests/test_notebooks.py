"""The notebooks: what is kept is what their sources say, and they run."""

import importlib.util
import re
from pathlib import Path

import pytest

import lit_stability
from tests.programs import Program

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

FOLDER = Path(lit_stability.__file__).parents[1] / "notebooks"
spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def cells(book):
    return [(cell.cell_type, cell.source) for cell in book.cells]


def printed(book):
    """All text that the cells of a notebook put out, that of cards too."""
    outputs = [o for c in book.cells if c.cell_type == "code" for o in c.outputs]
    return "".join(o.get("text", o.get("data", {}).get("text/plain", "") + "\n") for o in outputs)


def test_notebooks_are_the_four_of_the_documentation():
    """K2."""
    names = {"a_death_and_a_rescue", "a_killed_rank", "your_model_in_five_lines"}
    assert {p.stem for p in execute.SOURCES} == {*names, "why_the_classifier_stayed_at_0_percent"}


@pytest.mark.parametrize("source", execute.SOURCES, ids=lambda p: p.stem)
def test_notebook_holds_the_cells_of_its_source_and_was_run(source):
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(kept) == cells(jupytext.read(source)), "run python notebooks/execute.py"
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert source.with_suffix(".ipynb").stat().st_size < 200_000
    assert not re.search(r"/(root|home|work|Users)/", printed(kept))


def test_picture_of_the_readme_is_the_figure_of_the_notebook():
    kept = nbformat.read(FOLDER / f"{execute.PICTURE}.ipynb", as_version=4)
    picture = FOLDER / "pictures" / f"{execute.PICTURE}.png"
    assert [picture.read_bytes()] == execute.figures(kept)


def run_fast(name, monkeypatch):
    """What a notebook prints in fast mode, from the first cell to the last, in its own kernel."""
    monkeypatch.setenv("NOTEBOOKS", "fast")
    (source,) = [path for path in execute.SOURCES if path.stem == name]
    return execute.execute(source)


IN_KERNELS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")


@pytest.mark.long
@IN_KERNELS
def test_five_lines_save_the_accuracy(monkeypatch):
    """S7, K4: what the suite says comes below the cell that trains."""
    book = run_fast("your_model_in_five_lines", monkeypatch)
    five = printed(book)
    dead, alive = re.findall(r"accuracy (\d\.\d+), (\d+) weights are NaN", five)
    assert len(execute.figures(book)) == 1
    assert (float(dead[0]), int(alive[1])) == (0.5, 0)
    assert float(alive[0]) > 0.95
    assert "incident 1 at step 40: " in five


@pytest.mark.slow
@IN_KERNELS
def test_rescue_ends_as_the_undisturbed_run(monkeypatch):
    """S7, C3."""
    monkeypatch.setattr("jupyter_client.launcher.Popen", Program)
    book = run_fast("a_death_and_a_rescue", monkeypatch)
    last = {
        k: float(v) for k, v in re.findall(r"^(un\w+|with the suite) +(\S+)$", printed(book), re.M)
    }
    assert last["unprotected"] != last["unprotected"]
    assert last["with the suite"] == pytest.approx(last["undisturbed"], rel=0.02)
    assert len(execute.figures(book)) == 1


@pytest.mark.long
@IN_KERNELS
def test_suspects_of_the_classifier_are_tried_in_turn(monkeypatch):
    """S7, C5."""
    causal = printed(run_fast("why_the_classifier_stayed_at_0_percent", monkeypatch))
    suspects = ["not normalised", "would train", "as torch makes them", "the first update"]
    suspects += ["planned steps together", "made by"]
    found = [causal.index(each) for each in suspects]
    assert found == sorted(found)
    assert re.search(r"causal_default_init +<NUM> found +0%", causal)
    assert re.search(r"causal_small_gain_init +<NUM> found (100| 99)%", causal)
    assert re.search(r"causal_clean +<NUM> found 100%, and where there is none +0%", causal)


@pytest.mark.long
@IN_KERNELS
def test_killed_rank_is_started_again_and_ends_with_the_same_weights(monkeypatch):
    """S12: the program is one that a user would write."""
    killed = printed(run_fast("a_killed_rank", monkeypatch))
    assert "bit-identical: True" in killed
    assert re.search(r"crash at step 70 - resumed from step=0*60", killed)
