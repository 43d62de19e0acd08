"""Checks that the installed versions of Lightning and torch are supported.

Imports neither torch nor Lightning; it reads the metadata of installed packages.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

NEEDED = {"lightning": ">=2.6,!=2.6.2,!=2.6.3", "torch": ">=2.8"}
"""Distribution name -> supported versions, as in ``pyproject.toml``."""


def require_versions(lightning: str = "lightning") -> None:
    """Checks that every needed distribution is installed in a supported version.

    Args:
        lightning: the distribution that Lightning is used from: ``lightning``, or
            ``pytorch-lightning``, which has the same versions.

    Raises:
        ImportError: if one is not; the message has the version found and the command to fix it.
    """
    for needed, wanted in NEEDED.items():
        name = lightning if needed == "lightning" else needed
        found = installed(name)
        if found is None or not SpecifierSet(wanted).contains(found, prereleases=True):
            raise ImportError(
                f"lit_stability needs {name}{wanted}, found {found or 'none'}; "
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
