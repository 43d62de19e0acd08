"""`help()` of every public name is enough to use it: what of that can be checked by machine."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import lit_stability

PACKAGES = [lit_stability.__name__] + [
    found.name
    for found in pkgutil.walk_packages(lit_stability.__path__, "lit_stability.")
    if found.ispkg
]


def public():
    """Every class and function that a package names in its ``__all__``, once."""
    found = {}
    for package in map(importlib.import_module, PACKAGES):
        for name in getattr(package, "__all__", ()):
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found


THINGS = public()
ENTERED = [name for name in THINGS if not name.startswith("lit_stability.trainer_internals.")]
"""Without the room that the callbacks alone enter."""


def parameters(thing):
    """Those that somebody is to give: a dataclass documents its fields where they stand."""
    if hasattr(thing, "__dataclass_fields__") or getattr(thing, "_is_protocol", False):
        return []
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return []
    names = inspect.signature(thing).parameters.values()
    return [p.name for p in names if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def documented(thing, section):
    """The names under a section of the docstrings of a thing and of its ``__init__``."""
    texts = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing):
        texts.append(
            inspect.cleandoc(vars(thing).get("__init__").__doc__ or "")
            if "__init__" in vars(thing)
            else ""
        )
    blocks = [re.findall(rf"^{section}:\n((?:(?: .*)?\n?)*)", text, re.M) for text in texts]
    lines = "".join(block for each in blocks for block in each)
    return set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", lines, re.M))


def raised(thing):
    """Whether its own body, or that of its ``__init__``, raises a ValueError or a kin of it."""
    body = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isclass(thing) and "__post_init__" in vars(thing):
        body = thing.__post_init__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(body)))
    except (TypeError, OSError):
        return False
    calls = [
        n.exc.func
        for n in ast.walk(tree)
        if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)
    ]
    required = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "require"
    ]
    return bool(required) or any(getattr(c, "id", "") == "ValueError" for c in calls)


def test_packages_are_found():
    assert {"lit_stability.detectors", "lit_stability.policies.crash_risk"} <= set(PACKAGES)
    assert len(THINGS) > 100


@pytest.mark.parametrize("package", PACKAGES)
def test_package_says_what_it_is_for(package):
    assert len((importlib.import_module(package).__doc__ or "").split()) >= 8


@pytest.mark.parametrize("name", THINGS)
def test_public_name_has_a_sentence(name):
    text = inspect.getdoc(THINGS[name]) or ""
    assert not text.startswith(f"{THINGS[name].__name__}("), "the one that dataclasses make"
    assert re.match(r"(?s).{15,}?[.:]( |\n|$)", text), f"{name} is not told of: {text!r}"


@pytest.mark.parametrize("name", ENTERED)
def test_public_name_tells_of_its_parameters(name):
    needed = parameters(THINGS[name])
    if len(needed) == 1 and f"{needed[0]}" in (inspect.getdoc(THINGS[name]) or "").split("\n")[0]:
        return
    missing = [each for each in needed if each not in documented(THINGS[name], "Args")]
    assert not missing, f"{name}: no Args for {missing}"


@pytest.mark.parametrize("name", THINGS)
def test_public_name_tells_of_the_value_error_it_raises(name):
    if raised(THINGS[name]):
        assert "ValueError" in documented(THINGS[name], "Raises"), f"{name}: no Raises: ValueError"


@pytest.mark.parametrize("name", [n for n in THINGS if inspect.isclass(THINGS[n])])
def test_public_methods_of_a_class_have_a_sentence(name):
    fields = getattr(THINGS[name], "__dataclass_fields__", {})
    own = {n: m for n, m in vars(THINGS[name]).items() if n[0] != "_" and n not in fields}
    silent = [n for n, m in own.items() if inspect.isfunction(m) and not inspect.getdoc(m)]
    assert not silent
