"""Fails when Lightning moves a private name that the package uses, or the package uses another."""

import ast
import re
from pathlib import Path

import lightning
import pytest
from packaging.version import Version

import lit_stability
from lit_stability import stability_callbacks
from lit_stability.trainer_internals.private import (
    LIGHTNING,
    LIGHTNING_VERSIONS,
    PATHS,
    PRIVATE,
    TORCHMETRICS,
)
from tests.conftest import fit

ROOT = Path(lit_stability.__file__).parent
FILES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf8") for p in ROOT.rglob("*.py")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
LISTS_THEM = "trainer_internals/private.py"

STANDARD_LIBRARY = {
    *(
        "_SubParsersAction",
        "_actions",
        "_getframe",
        "_fields",
        "_is_protocol",
        "_current_frames",
        "_exit",
    ),
    "_thread:start_new_thread",
}
OURS = {
    *("_target_", "_replace_"),  # keys of a config
    *("_step", "_timestamp"),  # keys of a row of W&B
    "_original_forward",  # an attribute of a module that is kept in float32
    *("_begun", "_forward"),
}
"""Strings that look like a private name of another package but are not."""


def defined(tree):
    """Returns the private names that a file defines itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


EVERYWHERE = set().union(*map(defined, TREES.values()))


def reached(tree):
    """Yields private names of other packages that a file reads, writes, imports or looks up."""
    own = defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[A-Za-z]", node.attr):
            inherited = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr not in own and not (inherited and node.attr in EVERYWHERE):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            private = any(part.startswith("_") for part in node.module.split("."))
            if node.module == "__future__" or node.module.startswith("lit_stability"):
                continue
            for alias in node.names:
                if private or re.match(r"_[A-Za-z]", alias.name):
                    yield f"{node.module}:{alias.name}"
        elif isinstance(node, ast.Constant):
            text = str(node.value)
            if re.fullmatch(r"_[a-z]\w*", text) and text not in OURS | own:
                yield text


def test_every_private_name_in_the_source_is_in_the_list_with_its_folder():
    found = {
        (name, file.split("/")[0].removesuffix(".py"))
        for file, tree in TREES.items()
        if file != LISTS_THEM
        for name in reached(tree)
        if name not in STANDARD_LIBRARY
    }
    listed = {(each.name, room) for each in PRIVATE for room in each.rooms}
    assert found - listed == set(), "used and not listed, or used in another folder"
    assert listed - found == set(), "listed and no longer used"


@pytest.mark.parametrize(
    "source",
    [
        "def f(trainer):\n    return trainer._results",
        "from lightning.pytorch.loops import _Loop",
        "def f(trainer):\n    return getattr(trainer, '_results')",
        "import torch\ntorch._C._x()",
    ],
)
def test_scan_finds_private_names(source):
    """Ensures that the test above does not pass for lack of findings."""
    assert list(reached(ast.parse(source)))


def test_private_names_of_lightning_are_used_in_one_folder():
    assert {room for each in (*LIGHTNING, *TORCHMETRICS) for room in each.rooms} == {
        "trainer_internals"
    }


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("trainer_internals/")])
def test_loops_of_the_trainer_are_read_in_one_folder(file):
    """`fit_loop` has a public name, but nothing below it is a stable API."""
    loops = {"fit_loop", "epoch_loop", "optim_progress", "batch_progress"}
    names = [n.attr for n in ast.walk(TREES[file]) if isinstance(n, ast.Attribute)]
    assert not loops & set(names)


def test_every_private_name_has_a_replacement():
    assert all(len(each.instead.split()) >= 1 and each.instead[-1] != "." for each in PRIVATE)
    assert len({each.name for each in PRIVATE}) == len(PRIVATE)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("fit"), stability_callbacks(), max_steps=3)[1]


@pytest.mark.parametrize("path", PATHS)
def test_private_attribute_exists_on_a_trainer(path, trainer):
    value = trainer
    for name in path.split("."):
        assert hasattr(value, name), f"lightning {lightning.__version__} has no Trainer.{path}"
        value = getattr(value, name)


def test_counters_have_the_fields_that_are_rewound(trainer):
    loop = trainer.fit_loop.epoch_loop
    for progress in (
        loop.automatic_optimization.optim_progress.optimizer.step,
        loop.manual_optimization.optim_step_progress,
        loop.scheduler_progress,
    ):
        for tracker in (progress.total, progress.current):
            assert isinstance(tracker.ready, int)
            assert isinstance(tracker.completed, int)


def test_installed_lightning_is_a_tested_version():
    oldest, newest = map(Version, LIGHTNING_VERSIONS)
    assert oldest <= Version(lightning.__version__) <= newest, (
        "run the tests on this lightning, then widen LIGHTNING_VERSIONS"
    )
