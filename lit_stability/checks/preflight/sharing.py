"""Parameters that are shared, listed twice, or equal where they were meant to be one.

May import torch; knows no Lightning.
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
    """Parameters that one step, or two optimizers, would move twice.

    Raises:
        NotApplicableError: there is no optimizer.
    """
    if not optimizers:
        raise NotApplicableError("there is no optimizer")
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    owners: dict[int, list[int]] = defaultdict(list)
    for i, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners[id(parameter)].append(i)
    twice = [p for p, held in owners.items() if max(Counter(held).values()) > 1]
    shared = [p for p, held in owners.items() if len(set(held)) > 1]
    findings = []
    if twice:
        findings.append(_moved_twice("listed twice in one optimizer", _named(names, twice)))
    if shared:
        findings.append(_moved_twice("in more than one optimizer", _named(names, shared)))
    return findings


def _named(names: dict[int, str], ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(names.get(each, "a parameter that the model has not") for each in ids)


def _moved_twice(how: str, where: tuple[str, ...]) -> Finding:
    return Finding(
        check="duplicates",
        severity="warning",
        what=f"{len(where)} parameter{'s' if len(where) > 1 else ''} {how}",
        where=where,
        why="each step moves and decays them twice, and their moments are at odds",
        remedy="build the groups from named_parameters(), which gives each parameter once",
    )


def check_copies(model: nn.Module) -> list[Finding]:
    """Parameters that overlap in memory, and matrices that are equal without being one."""
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
                what="parameters share memory without being one parameter",
                where=tuple(" = ".join(names) for names in overlapping),
                why="an optimizer moves the same memory once for each of them",
                remedy="tie them by assigning the parameter itself: b.weight = a.weight",
            )
        )
    if equal := _equal_matrices(model, [n for names in overlapping for n in names]):
        findings.append(
            Finding(
                check="copies",
                severity="note",
                what="matrices are equal to the bit and are not tied",
                where=tuple(" = ".join(names) for names in equal),
                why="tied weights that were copied drift apart from the first step; layers made by "
                "copying one (as nn.TransformerEncoder does) begin alike",
                remedy="tie them by assigning the parameter itself, or initialise each; nothing, "
                "if "
                "copies are meant",
            )
        )
    return findings


def _equal_matrices(model: nn.Module, leave_out: Sequence[str]) -> list[list[str]]:
    """Groups of trainable matrices with the same values, other than one value throughout."""
    by_look: dict[tuple[torch.Size, float, float], list[str]] = defaultdict(list)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for name, p in parameters.items():
        if p.ndim > 1 and p.numel() > 1 and not p.is_meta and name not in leave_out:
            first = p.flatten()
            if bool((first != first[0]).any()):
                by_look[p.shape, float(first[0]), float(p.float().sum())].append(name)
    groups = []
    for names in by_look.values():
        alike = [n for n in names if torch.equal(parameters[n], parameters[names[0]])]
        if len(alike) > 1:
            groups.append(alike)
    return groups
