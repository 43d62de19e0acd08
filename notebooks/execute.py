"""Runs the notebooks of this folder and writes each ``.ipynb`` next to its source.

The source of a notebook is a percent-format ``.py``; its ``.ipynb`` contains the same cells and
their outputs. Run ``python notebooks/execute.py [NAME ...]``. The committed notebooks use the fast
mode; ``NOTEBOOKS=full`` runs the full experiments. The figure of one of them is the picture of the
README.
"""

import base64
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(path for path in FOLDER.glob("*.py") if path != Path(__file__).resolve())
PICTURE = "a_death_and_a_rescue"
"""Notebook whose figure is also written to the folder ``pictures``."""


def execute(source: Path) -> nbformat.NotebookNode:
    """Runs all cells of a source and returns the notebook.

    Args:
        source: Path of the ``.py``.

    Raises:
        CellExecutionError: A cell raised an exception.
    """
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # deterministic instead of random, to keep diffs small
    return notebook


def figures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """Returns the figures of a notebook that was run, as PNG."""
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    encoded = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return [base64.b64decode(each) for each in encoded]


if __name__ == "__main__":
    for path in SOURCES:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            notebook = execute(path)
            nbformat.write(notebook, path.with_suffix(".ipynb"))
            if path.stem == PICTURE:
                (figure,) = figures(notebook)
                (FOLDER / "pictures" / f"{PICTURE}.png").write_bytes(figure)
            print(path.with_suffix(".ipynb"))
