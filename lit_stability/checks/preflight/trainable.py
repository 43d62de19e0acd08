"""What trains, what is frozen, and whether the optimizer and the backward pass agree.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import DeclarationError, NotApplicableError


def check_gradients(first: Observation, second: Observation, model: nn.Module) -> list[Finding]:
    """Trainable parameters that a backward pass gives nothing, before and after small steps.

    A bias that its own layer's weight makes up for (that of a key, or before a norm) has no
    gradient by nature, and is left out.
    """
    unreached = [name for name, g in first.gradients.items() if g is None]
    still = [n for n, g in first.gradients.items() if g == 0.0 and second.gradients[n] == 0.0]
    alive = {n.rpartition(".")[0] for n, g in second.gradients.items() if g}
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    still = [n for n in still if shapes[n] > 1 or n.rpartition(".")[0] not in alive]
    findings = []
    if unreached:
        findings.append(
            Finding(
                check="gradients",
                severity="warning",
                what=f"{_count(unreached, 'trainable parameter')} had no part in the loss",
                where=tuple(unreached),
                why="they will not train: they are unused, detached, or run under no_grad()",
                remedy="use them, or freeze them with requires_grad_(False)",
            )
        )
    if still:
        findings.append(
            Finding(
                check="gradients",
                severity="warning",
                what=f"the gradients of {_count(still, 'trainable parameter')} are exactly 0, also "
                "after small steps on all others",
                where=tuple(still),
                why="they will not train: what follows them is zero, saturated or masked out",
                remedy="look at the first module after them whose output is zero or constant",
            )
        )
    return findings


def check_frozen(model: nn.Module, patterns: Sequence[str] = ()) -> list[Finding]:
    """Frozen modules that still change or draw, and parameters meant to be frozen that are not.

    Args:
        model: in the modes in which it will train.
        patterns: names of parameters meant to be frozen, with wildcards, such as ``backbone.*``.

    Raises:
        NotApplicableError: nothing is frozen or meant to be.
        DeclarationError: a pattern fits no parameter.
    """
    parameters = dict(model.named_parameters())
    findings = _meant_to_be_frozen(model, patterns)
    if all(p.requires_grad for p in parameters.values()):
        if not patterns:
            raise NotApplicableError("nothing is frozen, and frozen= names nothing")
        return findings
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    findings.append(
        Finding(
            check="frozen",
            severity="note",
            what=f"{trainable:,} of {total:,} weights train, {100 * trainable / total:.3g} %",
            why="a backbone that was to be frozen, or was not, shows here first",
            remedy="compare it with what you meant",
        )
    )
    return findings + _restless(model)


def _meant_to_be_frozen(model: nn.Module, patterns: Sequence[str]) -> list[Finding]:
    names = dict(model.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise DeclarationError(
                f"frozen={pattern!r} fits no parameter; those of the model begin {list(names)[:3]}"
            )
    meant = {n for pattern in patterns for n in fnmatch.filter(names, pattern)}
    loose = [n for n in names if n in meant and names[n].requires_grad]
    if not loose:
        return []
    return [
        Finding(
            check="frozen",
            severity="error",
            what=f"{_count(loose, 'parameter')} meant to be frozen would train",
            where=tuple(loose),
            why="new heads send large gradients at first, which destroy what the backbone learnt",
            remedy="call requires_grad_(False) on them before the optimizer is built",
        )
    ]


def _restless(model: nn.Module) -> list[Finding]:
    """Frozen modules in train mode, where that makes a difference."""
    found: dict[str, list[str]] = {}
    for name, module in frozen_modules(model):
        for inner, each in module.named_modules():
            effect = _effect(each)
            if effect is not None:
                found.setdefault(effect, []).append(".".join(filter(None, (name, inner))))
    return [
        Finding(
            check="frozen",
            severity="warning",
            what=f"a frozen module is in train mode: {effect}",
            where=tuple(names),
            why="it does not give what it gave when it was trained, nor the same twice",
            remedy="call eval() on the frozen module at the start of every epoch (Lightning calls "
            "train() on the whole), or override train()",
        )
        for effect, names in found.items()
    ]


def _effect(module: nn.Module) -> str | None:
    if not module.training:
        return None
    if isinstance(module, _DropoutNd):
        return "dropout is active" if module.p > 0 else None
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "running statistics are updated"
    return None


def frozen_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The outermost modules that hold parameters, none of which train."""
    done: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if not parameters or any(p.requires_grad for p in parameters):
            continue
        if not any(name.startswith(f"{outer}.") for outer in done):
            done.append(name)
            yield name, module


def check_optimized(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Finding]:
    """Trainable parameters that no optimizer has, frozen ones that one has.

    Raises:
        NotApplicableError: there is no optimizer.
    """
    if not optimizers:
        raise NotApplicableError("there is no optimizer")
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    missing = [n for n, p in named.items() if p.requires_grad and id(p) not in held]
    frozen = [n for n, p in named.items() if not p.requires_grad and id(p) in held]
    foreign = len(held - {id(p) for p in model.parameters()})
    findings = []
    if missing:
        findings.append(
            Finding(
                check="optimizer",
                severity="warning",
                what=f"no optimizer has {_count(missing, 'trainable parameter')}",
                where=tuple(missing),
                why="they get gradients and are never moved",
                remedy="hand them to the optimizer, built after the model, or freeze them",
            )
        )
    if foreign:
        findings.append(
            Finding(
                check="optimizer",
                severity="error" if foreign == len(held) else "warning",
                what=f"the optimizer has {foreign} parameters that the model has not",
                why="it moves weights that are not used: the model was replaced after it was built",
                remedy="build the optimizer in configure_optimizers, from self.parameters()",
            )
        )
    if frozen:
        findings.append(
            Finding(
                check="optimizer",
                severity="note",
                what=f"the optimizer has {_count(frozen, 'frozen parameter')}",
                where=tuple(frozen),
                why="they stand still, unless something unfreezes them",
                remedy="leave them out, if nothing is to unfreeze them",
            )
        )
    return findings


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"
