"""Decides which package Lightning is in this process: `lightning` or `pytorch_lightning`.

Both hold the same code and share no class: a callback of one is none of the other. Imports
neither; `lit_stability.lightning_package` imports the one that is chosen.
"""

from __future__ import annotations

import os
import sys

from lit_stability.versions import installed

VARIABLE = "LIT_STABILITY_LIGHTNING"

_MODULES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
"""Package -> the module that has its Trainer; the preferred package comes first."""


def choose_lightning() -> str:
    """Returns ``lightning`` or ``pytorch_lightning``: the package that the callbacks work with.

    It is the one that the environment variable ``LIT_STABILITY_LIGHTNING`` names; else the one
    that the program has imported; else the one that is installed. Where both are, it is
    ``lightning``: which of them the Trainer will come from cannot be known yet.

    Raises:
        ValueError: if the variable names neither.
    """
    if named := os.environ.get(VARIABLE):
        if named not in _MODULES:
            raise ValueError(
                f"{VARIABLE} must be lightning or pytorch_lightning, the package that the Trainer "
                f"is imported from, got {named!r}; unset it to use the package that is imported"
            )
        return named
    # Not the package alone, which a failed import or one of its helpers leaves behind.
    loaded = [
        name for name, module in _MODULES.items() if f"{module}.trainer.trainer" in sys.modules
    ]
    present = loaded or [name for name in _MODULES if installed(distribution(name))]
    return next(iter(present), "lightning")


def distribution(package: str) -> str:
    """Returns the name under which pip installs a package.

    >>> distribution("pytorch_lightning")
    'pytorch-lightning'
    """
    return package.replace("_", "-")
