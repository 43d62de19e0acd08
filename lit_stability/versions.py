"""Which versions of the packages below this one works with, and the refusal of any other.

Imports neither torch nor Lightning: it asks what is installed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

NEEDED = {"lightning": ">=2.6,!=2.6.2,!=2.6.3", "torch": ">=2.13"}
"""Name of a distribution -> the versions that will do, as in ``pyproject.toml``."""


def require_versions() -> None:
    """Refuse to go on with a version that is too old, or with none.

    Raises:
        ImportError: with what was found, and the command that mends it.
    """
    for name, wanted in NEEDED.items():
        found = installed(name)
        if found is None or not SpecifierSet(wanted).contains(found, prereleases=True):
            other = installed("pytorch-lightning") if name == "lightning" and not found else None
            beside = f" (pytorch-lightning {other} is another package)" if other else ""
            raise ImportError(
                f"lit_stability needs {name}{wanted}, found {found or 'none'}{beside}; "
                f"run pip install '{name}{wanted}'"
            )


def installed(name: str) -> str | None:
    """The version of a distribution, or None where it is not installed.

    Args:
        name: as pip knows it.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return None
