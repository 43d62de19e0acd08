"""Removes parts of a checkpoint that do not have the expected structure, and says which.

A file may have been edited, converted, or written by another program. What is left after this has
the types that the examination relies on. May import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

from lit_stability.checks.finding import Finding


def well_formed(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns a shallow copy without malformed parts, and one line for each part left out.

    Args:
        checkpoint: As loaded; it is not changed.

    >>> well_formed({"global_step": "x", "epoch": 3})
    ({'epoch': 3}, ['global_step is a str, expected a whole number'])
    """
    problems: list[str] = []
    kept = _without(checkpoint, _TOP_LEVEL, "", problems)
    states = kept.get("optimizer_states")
    if states is not None:
        kept["optimizer_states"] = [
            _optimizer(state, f"optimizer_states[{i}]", problems) for i, state in enumerate(states)
        ]
    return kept, problems


def file_findings(damage: str | None) -> list[Finding]:
    """Returns the finding on a file whose content is not what was written, if it is not."""
    if damage is None:
        return []
    return [
        Finding(
            severity="error",
            what="damaged file",
            why=f"{damage}: some values are not those that were saved, even if they look ordinary",
            remedy="use another checkpoint, and check the disk or the copy",
        )
    ]


def structure_findings(problems: list[str]) -> list[Finding]:
    """Returns the finding on parts that were left out, if there are any."""
    if not problems:
        return []
    return [
        Finding(
            severity="warning",
            what="malformed parts",
            where=tuple(problems),
            why="they do not have the structure that Lightning and torch.optim write, and were not "
            "examined; resuming from this file fails, or ignores them",
            remedy="use a checkpoint as the Trainer wrote it",
        )
    ]


def _optimizer(state: Any, path: str, problems: list[str]) -> dict[str, Any]:
    """Returns the state dict of an optimizer; empty if it is none: the others keep their number."""
    if not isinstance(state, Mapping):
        problems.append(f"{path} is a {type(state).__name__}, expected a mapping")
        return {}
    kept = _without(state, _OPTIMIZER, path, problems)
    groups = enumerate(kept.get("param_groups", ()))
    kept["param_groups"] = [
        # Optimizers of other packages have three betas or two epsilons: no problem, but not read.
        _without(_without(group, _GROUP, f"{path}.param_groups[{i}]", problems), _OPTIONS, "", [])
        for i, group in groups
    ]
    kept["state"] = {
        index: _without(entry, _ENTRY, f"{path}.state[{index}]", problems)
        for index, entry in kept.get("state", {}).items()
        if isinstance(entry, Mapping)
    }
    return kept


Check = tuple[Callable[[Any], bool], str]


def _without(
    state: Mapping[Any, Any], checks: Mapping[str, Check], path: str, problems: list[str]
) -> dict[Any, Any]:
    """Returns a copy without the entries whose check fails; None counts as missing."""
    kept = {key: value for key, value in state.items() if value is not None or key not in checks}
    for key, (check, expected) in checks.items():
        if key in kept and not check(kept[key]):
            kind = type(kept.pop(key)).__name__
            where = f"{path}.{key}" if path else key
            problems.append(f"{where} is a {kind}, expected {expected}")
    return kept


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_mappings(value: Any) -> bool:
    return _is_sequence(value) and all(isinstance(each, Mapping) for each in value)


def _are_indices(value: Any) -> bool:
    return _is_sequence(value) and all(isinstance(each, Hashable) for each in value)


def _are_betas(value: Any) -> bool:
    return _is_sequence(value) and bool(value) and all(map(_is_number, value))


_NUMBER: Check = (_is_number, "a number")
_TOP_LEVEL: dict[str, Check] = {
    "epoch": (_is_count, "a whole number"),
    "global_step": (_is_count, "a whole number"),
    "pytorch-lightning_version": (lambda value: isinstance(value, str), "a text"),
    "optimizer_states": (_is_sequence, "a list"),
    "lr_schedulers": (_is_sequence, "a list"),
    "callbacks": (lambda value: isinstance(value, Mapping), "a mapping"),
}
_OPTIMIZER: dict[str, Check] = {
    "param_groups": (_are_mappings, "a list of mappings"),
    "state": (lambda value: isinstance(value, Mapping), "a mapping"),
}
_GROUP: dict[str, Check] = {
    "params": (_are_indices, "a list of indices"),
    "param_names": (_is_sequence, "a list of names"),
    "lr": _NUMBER,
}
_OPTIONS: dict[str, Check] = {"eps": _NUMBER, "betas": (_are_betas, "a list of numbers")}
_ENTRY: dict[str, Check] = {"step": _NUMBER}
