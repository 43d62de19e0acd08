"""Interface of the protections that the benchmarks compare.

Imports Lightning; a protection imports the package that it wraps inside its methods.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback


class Protection:
    """A protection of one fit; the benchmarks create a new object for each fit.

    A fit gets ``callbacks(folder)``, after the callbacks of the run itself, and
    ``trainer_options()``, of which the run overrides those that it sets itself. After each batch
    the benchmark reads ``alarms()`` and records new ones with the number of that batch, so a
    protection cannot choose the step of its alarms. `docs/corpus.md` has a complete example.
    """

    name: ClassVar[str]
    """Name in tables."""
    package: ClassVar[str | None] = None
    """Name on PyPI; None for protections of Lightning and of this project."""
    raises_alarms: ClassVar[bool] = False
    """Whether it reports faults; a clipping rule does not."""

    def callbacks(self, folder: Path) -> list[Callback]:
        """Returns the callbacks for the Trainer.

        Args:
            folder: Folder for files that the protection writes.

        Raises:
            ImportError: The package is not installed.
        """
        return []

    def trainer_options(self) -> dict[str, Any]:
        """Returns further arguments of the Trainer."""
        return {}

    def alarms(self) -> Sequence[str]:
        """Returns all alarms so far, the newest last, each as a word or two ("spike").

        An alarm says that the run is at fault or about to be; what is only recorded is none.
        """
        return ()

    def stops(self) -> tuple[type[BaseException], ...]:
        """Returns the exceptions with which the protection ends a fit on purpose."""
        return ()

    @classmethod
    def release(cls) -> str | None:
        """Returns the version of the package; None without a package or if not installed."""
        try:
            return version(cls.package) if cls.package else None
        except PackageNotFoundError:
            return None

    @classmethod
    def problem(cls) -> str | None:
        """Returns why the protection cannot run here, or None."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                cls().callbacks(Path(folder))
        # Any error of a third-party package is listed and must not end the benchmark.
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None
