"""Finds the experiments of a project: its config files with their descriptions.

May import OmegaConf, but neither torch nor lightning.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_stability.cli.config import read_own
from lit_stability.cli.instantiate import suggest
from lit_stability.errors import ConfigError

FOLDER = Path("configs")


def catalogue(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Returns the content of each config file in a folder, by name; subfolders are ignored.

    Raises:
        ConfigError: if the folder does not exist, or a file is not a YAML mapping.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; experiments are the files in {FOLDER}/")
    return {file.stem: read_own(file) for file in sorted(folder.glob("*.yaml"))}


def listing(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns one line per config: its name and its description.

    >>> print(listing({"clean": {"about": "no fault", "expect": {}}, "part": {}}))
    clean  no fault
    part   (has no `expect`)
    """
    width = max(map(len, configs), default=0)
    rows = []
    for name, own in configs.items():
        notes = [str(own["about"])] if own.get("about") else []
        notes += [] if "expect" in own else ["(has no `expect`)"]
        rows.append(f"{name:<{width}}  {' '.join(notes)}".rstrip())
    return "\n".join(rows)


def choose(
    configs: Mapping[str, Mapping[str, Any]], wanted: Sequence[str], *, everything: bool = False
) -> list[str]:
    """Returns the experiments that match names and patterns, each once, in the order given.

    Args:
        configs: the catalogue.
        wanted: names, or patterns such as ``translation_*``.
        everything: select all configs with an `expect`.

    Raises:
        ConfigError: if a name or pattern matches none.

    >>> configs = {"a_1": {"expect": {}}, "a_2": {"expect": {}}, "part": {}}
    >>> choose(configs, ["a_2", "a_*"])
    ['a_2', 'a_1']
    """
    experiments = [name for name, own in configs.items() if "expect" in own]
    chosen, problems = list(experiments) if everything else [], []
    for pattern in wanted:
        found = fnmatch.filter(experiments, pattern)
        chosen += found
        if not found and pattern in configs:
            problems.append(f"{pattern}: has no `expect`; run it with lit-stability fit")
        elif not found:
            hint = suggest(pattern, experiments)
            problems.append(f"{pattern}: no such experiment in {FOLDER}/{hint}")
    if problems:
        raise ConfigError(*problems)
    return list(dict.fromkeys(chosen))
