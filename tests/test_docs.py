"""The documentation under `docs/`: its code runs, its commands and options exist."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import lightning.pytorch as pl
import pytest

import lit_stability
from lit_stability.cli.main import _parser
from lit_stability.diagnosis import CAUSES
from lit_stability.loggers import adapter
from tests.conftest import Regression, regression_data

ROOT = Path(lit_stability.__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = {
    path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf8")
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts
}
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = {
    "guides/incidents.md": 1,  # loads a file of an incident
    "ranks.md": 1,  # is started by torchrun
}
"""Pages with blocks that cannot run here, and how many."""


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return regression_data(batches=3)


class ShortTrainer(pl.Trainer):
    """A Trainer of three steps that prints nothing."""

    def __init__(self, **options):
        short = {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False}
        super().__init__(**{**short, "enable_model_summary": False, **options})


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """What a page may use without defining it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "incidents.jsonl").touch()
    known, adapters = dict(CAUSES), list(adapter._ADAPTERS)
    yield {"model": Regression(), "datamodule": Data(), "folder": folder}
    CAUSES.clear()
    CAUSES.update(known)
    adapter._ADAPTERS[:] = adapters


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```python" in text])
def test_python_of_a_page_runs(page, shown):
    blocks = BLOCK.findall(TEXTS[page])
    assert len(blocks) == TEXTS[page].count("```python")
    assert sum(bool(mark) for mark, _ in blocks) == NOT_RUN.get(page, 0)
    for mark, code in blocks:
        compiled = compile(code, page, "exec")
        if not mark:
            exec(compiled, shown)


LINES = [
    (page, line)
    for page, text in TEXTS.items()
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("lit-stability ")
]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[line for _, line in LINES])
def test_command_of_a_page_is_understood(page, line):
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    args, rest = _parser().parse_known_args(words)
    overrides = [word for word in rest if not word.startswith("-")]
    assert [word for word in rest if word not in overrides] == []
    assert not overrides or hasattr(args, "overrides")
    for config in [c for c in getattr(args, "config", None) or [] if c != "mine"]:
        assert (ROOT / "configs" / f"{config}.yaml").exists()


def options_in(text):
    """The rows of tables whose first two columns are an option and its default."""
    tables = re.findall(r"^\| option[^|]*\| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    rows = [row for table in tables for row in table.splitlines()]
    return {
        m[1]: ast.literal_eval(m[2])
        for m in map(re.compile(r"\| `(\w+)` \| `(.+?)` \|").match, rows)
    }


WITH_OPTIONS = {
    **{page: None for page in TEXTS if page.startswith("callbacks/") and "index" not in page},
    "explanation/escalation.md": lit_stability.Budget,
}


@pytest.mark.parametrize("page", WITH_OPTIONS)
def test_options_of_a_page_are_those_of_the_class(page):
    cls = WITH_OPTIONS[page]
    if cls is None:
        (name,) = re.findall(r"autoclass:: lit_stability\.(\w+)", TEXTS[page])
        cls = getattr(lit_stability, name)
    parameters = inspect.signature(cls).parameters
    assert options_in(TEXTS[page]) == {name: p.default for name, p in parameters.items()}


CALLED = sorted(
    {
        (name, option)
        for page, text in TEXTS.items()
        if page != "migration.md"  # has names of 0.1.0
        for name, option in re.findall(r"`(\w+)\((\w+)=[^`]*\)`", text)
        if hasattr(lit_stability, name)
        or hasattr(importlib.import_module("lit_stability.detectors"), name)
    }
)


@pytest.mark.parametrize(("name", "option"), CALLED)
def test_option_in_a_sentence_exists(name, option):
    detectors = importlib.import_module("lit_stability.detectors")
    owner = getattr(lit_stability, name, None) or getattr(detectors, name)
    assert option in inspect.signature(owner).parameters


@pytest.mark.parametrize("name", lit_stability.__all__)
def test_public_name_is_documented(name):
    home = "callbacks" if inspect.isclass(getattr(lit_stability, name)) else "api"
    assert any(re.search(rf"\b{name}\b", text) for text in TEXTS.values()), (
        f"docs/{home}: no {name}"
    )
