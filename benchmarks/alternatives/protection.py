"""The one interface of everything that protects a fit.

May import Lightning; a protection imports what it wraps inside its methods.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback


class Protection:
    """One protection of one fit; make another object for another fit.

    Give the Trainer ``callbacks(folder)`` after the callbacks of the run itself, and
    ``trainer_options()``.
    """

    name: ClassVar[str]
    """In tables."""
    package: ClassVar[str | None] = None
    """What PyPI calls it, None for what is installed with Lightning or with this project."""
    tells: ClassVar[bool] = False
    """Whether it says that something is wrong; a clipping rule does not."""

    def callbacks(self, folder: Path) -> list[Callback]:
        """What the Trainer is given.

        Args:
            folder: for files that it writes.

        Raises:
            ImportError: if its package is not installed.
        """
        return []

    def trainer_options(self) -> dict[str, Any]:
        """Further arguments of the Trainer."""
        return {}

    def alarms(self) -> int:
        """How often it has said so far that something is wrong."""
        return 0

    def stops(self) -> tuple[type[BaseException], ...]:
        """What it raises to end a fit on purpose."""
        return ()

    @classmethod
    def release(cls) -> str | None:
        """Version of its package; None where it has none of its own or is not installed."""
        try:
            return version(cls.package) if cls.package else None
        except PackageNotFoundError:
            return None

    @classmethod
    def problem(cls) -> str | None:
        """Why it cannot be run here, or None."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                cls().callbacks(Path(folder))
        # Whatever a foreign package does wrong on import is to be listed, not to end the table.
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None
