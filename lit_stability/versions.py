"""Checks that the installed versions of Lightning and torch are supported.

Imports neither torch nor Lightning; it reads the metadata of installed packages.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

NEEDED = {"lightning": ">=2.6,!=2.6.2,!=2.6.3", "torch": ">=2.8"}
"""Distribution name -> supported versions, as in ``pyproject.toml``."""


def require_versions() -> None:
    """Checks that every needed distribution is installed in a supported version.

    Raises:
        ImportError: if one is not; the message has the version found and the command to fix it.
    """
    for name, wanted in NEEDED.items():
        found = installed(name)
        if found is None or not SpecifierSet(wanted).contains(found, prereleases=True):
            other = installed("pytorch-lightning") if name == "lightning" and not found else None
            hint = f" (pytorch-lightning {other} is another package)" if other else ""
            raise ImportError(
                f"lit_stability needs {name}{wanted}, found {found or 'none'}{hint}; "
                f"run pip install '{name}{wanted}'"
            )


def installed(name: str) -> str | None:
    """Returns the version of a distribution, or None if it is not installed.

    Args:
        name: name of the distribution, as used by pip.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return None
