"""Decides which package Lightning is in this process: `lightning` or `pytorch_lightning`.

Both hold the same code and share no class: a callback of one is none of the other. Imports
neither; `lit_stability.lightning_package` imports the one that is chosen.
"""

from __future__ import annotations

import dis
import logging
import os
import sys
from collections.abc import Iterator
from types import FrameType

from lit_stability.console import attach
from lit_stability.versions import installed

VARIABLE = "LIT_STABILITY_LIGHTNING"

LIGHTNING_ROOTS = ("lightning", "lightning_fabric", "pytorch_lightning")
"""Top-level names of the modules whose code is Lightning's, under either name."""

_MODULES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
"""Package -> the module that has its Trainer. The one to prefer comes first."""


def choose_lightning() -> str:
    """Returns ``lightning`` or ``pytorch_lightning``: the package that the callbacks work with.

    The first of these that gives an answer decides; once Lightning is imported it is final:

    1. the environment variable ``LIT_STABILITY_LIGHTNING``;
    2. the code that is importing this package now: it belongs to one of the two, or imports one;
    3. the one that the process has imported, if it is one;
    4. the one that is installed; ``lightning`` if both are.

    Raises:
        ValueError: if the variable names neither.
    """
    final = getattr(sys.modules.get("lit_stability.lightning_package"), "PACKAGE", None)
    return final or _named() or _wanted_by_callers() or _loaded() or _installed()


def trainer_module(package: str) -> str:
    """Returns the module that users import the Trainer of a package from.

    >>> trainer_module("lightning")
    'lightning.pytorch'
    """
    return _MODULES[package]


def distribution(package: str) -> str:
    """Returns the name under which pip installs a package.

    >>> distribution("pytorch_lightning")
    'pytorch-lightning'
    """
    return package.replace("_", "-")


def mixed_packages(kind: type) -> str | None:
    """Returns what to do about a class that is made from the package that is not in use.

    Args:
        kind: class of a Trainer, a module or a callback.

    Returns:
        A text that starts with the package of the class; None if it is of the package in use, or
        of neither.
    """
    used = choose_lightning()
    bases = [base.__module__ for base in kind.__mro__]
    of = [package for package in _MODULES if any(_is_of(base, package) for base in bases)]
    if used in of or not of:
        return None
    found, module = _MODULES[of[0]], _MODULES[used]
    return (
        f"{found}, but lit_stability was imported for {module}, which shares no class with it; set "
        f"{VARIABLE}={of[0]}, or import {found} before lit_stability; or import everything, the "
        f"model and its data included, from {module}"
    )


def suite_logger() -> logging.Logger:
    """Returns the logger of this package, below the one of Lightning that has handler and level."""
    return attach(logging.getLogger(f"{trainer_module(choose_lightning())}.lit_stability"))


def _named() -> str | None:
    named = os.environ.get(VARIABLE)
    if named and named not in _MODULES:
        raise ValueError(
            f"{VARIABLE} must be lightning or pytorch_lightning, the package that the Trainer is "
            f"imported from, got {named!r}; set one of them, or unset it"
        )
    return named or None


def _wanted_by_callers() -> str | None:
    """Returns the package that the code on the stack is part of, or imports: the innermost first.

    Sorted imports have `lit_stability` before `pytorch_lightning`, and then nothing is loaded yet.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        names = [str(frame.f_globals.get("__name__")), *_imports_of(frame)]
        if names[0].split(".")[0] != "lit_stability":
            found = {
                package for package in _MODULES if any(_is_of(name, package) for name in names)
            }
            if len(found) == 1:
                return found.pop()
        frame = frame.f_back
    return None


def _imports_of(frame: FrameType) -> Iterator[str]:
    instructions = dis.get_instructions(frame.f_code)
    return (str(each.argval) for each in instructions if each.opname == "IMPORT_NAME")


def _is_of(name: str, package: str) -> bool:
    """Returns whether a module is of a package; `lightning.fabric` says nothing of the Trainer."""
    module = _MODULES[package]
    return name in (package, module) or name.startswith(f"{module}.")


def _loaded() -> str | None:
    # Its Trainer, because an import that failed, or one of a helper, leaves other modules behind.
    found = [name for name in _MODULES if f"{_MODULES[name]}.trainer.trainer" in sys.modules]
    return found[0] if len(found) == 1 else None


def _installed() -> str:
    found = (name for name in _MODULES if installed(distribution(name)))
    return next(found, "lightning")
