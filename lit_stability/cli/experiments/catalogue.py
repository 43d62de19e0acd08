"""Which experiments there are: the config files of a project, and what each says of itself.

May import OmegaConf. It loads neither torch nor lightning.
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
    """What each config file in a folder states itself, by name; folders below hold parts only.

    Raises:
        ConfigError: there is no such folder, or a file is not a YAML mapping.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder here; experiments are the files in {FOLDER}/")
    return {file.stem: read_own(file) for file in sorted(folder.glob("*.yaml"))}


def listing(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each config: its name, and what it is about.

    >>> print(listing({"clean": {"about": "no fault", "expect": {}}, "part": {}}))
    clean  no fault
    part   (states no `expect`)
    """
    width = max(map(len, configs), default=0)
    rows = []
    for name, own in configs.items():
        said = [str(own["about"])] if own.get("about") else []
        said += [] if "expect" in own else ["(states no `expect`)"]
        rows.append(f"{name:<{width}}  {' '.join(said)}".rstrip())
    return "\n".join(rows)


def choose(
    configs: Mapping[str, Mapping[str, Any]], wanted: Sequence[str], *, everything: bool = False
) -> list[str]:
    """The experiments that names and patterns ask for, each once, in the order asked.

    Args:
        configs: the catalogue.
        wanted: names, or patterns such as ``translation_*``.
        everything: all that state an `expect`.

    Raises:
        ConfigError: a name or pattern fits none.

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
            problems.append(f"{pattern}: states no `expect`; run it with lit-stability fit")
        elif not found:
            hint = suggest(pattern, experiments)
            problems.append(f"{pattern}: no such experiment in {FOLDER}/{hint}")
    if problems:
        raise ConfigError(*problems)
    return list(dict.fromkeys(chosen))
