"""Runs the notebooks of this folder, and writes each beside its source.

A notebook is written as a percent-format ``.py``; its ``.ipynb`` holds the same cells and what
they printed. ``python notebooks/execute.py [NAME ...]``; ``NOTEBOOKS=full`` runs them
at full length; the ones that are kept are fast.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(path for path in FOLDER.glob("*.py") if path != Path(__file__).resolve())


def execute(source: Path) -> nbformat.NotebookNode:
    """Run a source from its first cell to its last.

    Args:
        source: the ``.py``.

    Raises:
        CellExecutionError: if a cell raises.
    """
    book = jupytext.read(source)
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(book, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # instead of a random one, which would differ each time
    return book


if __name__ == "__main__":
    for path in SOURCES:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            nbformat.write(execute(path), path.with_suffix(".ipynb"))
            print(path.with_suffix(".ipynb"))
