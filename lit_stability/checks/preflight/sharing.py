"""Finds parameters that are updated twice, share memory, or are equal without being tied.

May import torch; does not import Lightning.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.report import NotApplicableError


def check_duplicates(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Finding]:
    """Finds parameters that are listed twice in one optimizer, or in more than one.

    Raises:
        NotApplicableError: If there is no optimizer.
    """
    if not optimizers:
        raise NotApplicableError("there is no optimizer")
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    owners: dict[int, list[int]] = defaultdict(list)
    for i, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners[id(parameter)].append(i)
    twice = [p for p, numbers in owners.items() if max(Counter(numbers).values()) > 1]
    shared = [p for p, numbers in owners.items() if len(set(numbers)) > 1]
    findings = []
    if twice:
        findings.append(_updated_twice("listed twice in one optimizer", _names(names, twice)))
    if shared:
        findings.append(_updated_twice("in more than one optimizer", _names(names, shared)))
    return findings


def _names(names: dict[int, str], ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(names.get(i, "a parameter that is not in the model") for i in ids)


def _updated_twice(how: str, where: tuple[str, ...]) -> Finding:
    return Finding(
        check="duplicates",
        severity="warning",
        what=f"{len(where)} parameter{'s' if len(where) > 1 else ''} {how}",
        where=where,
        why="each step updates and decays them twice, with inconsistent moments",
        remedy="build the groups from named_parameters(), which lists each parameter once",
    )


def check_copies(model: nn.Module) -> list[Finding]:
    """Finds parameters that share memory, and matrices that are equal but not tied."""
    parameters = dict(model.named_parameters())
    findings = []
    by_memory: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, p in parameters.items():
        if p.numel() and not p.is_meta:
            by_memory[str(p.device), p.data_ptr()].append(name)
    overlapping = [names for names in by_memory.values() if len(names) > 1]
    if overlapping:
        findings.append(
            Finding(
                check="copies",
                severity="warning",
                what="different parameters share memory",
                where=tuple(" = ".join(names) for names in overlapping),
                why="an optimizer updates the same memory once for each of them",
                remedy="tie them by assigning the parameter itself: b.weight = a.weight",
            )
        )
    if equal := _equal_matrices(model, [n for names in overlapping for n in names]):
        findings.append(
            Finding(
                check="copies",
                severity="note",
                what="matrices are bitwise equal but not tied",
                where=tuple(" = ".join(names) for names in equal),
                why="weights that are copied instead of tied diverge from the first step on; "
                "layers made by copying one (as nn.TransformerEncoder does) start equal",
                remedy="tie them by assigning the parameter itself, or initialise each; nothing, "
                "if copies are intended",
            )
        )
    return findings


def _equal_matrices(model: nn.Module, exclude: Sequence[str]) -> list[list[str]]:
    """Returns groups of trainable matrices with the same values; constant matrices are ignored."""
    candidates: dict[tuple[torch.Size, float, float], list[str]] = defaultdict(list)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for name, p in parameters.items():
        if p.ndim > 1 and p.numel() > 1 and not p.is_meta and name not in exclude:
            flat = p.flatten()
            if bool((flat != flat[0]).any()):
                candidates[p.shape, float(flat[0]), float(p.float().sum())].append(name)
    groups = []
    for names in candidates.values():
        equal = [n for n in names if torch.equal(parameters[n], parameters[names[0]])]
        if len(equal) > 1:
            groups.append(equal)
    return groups
