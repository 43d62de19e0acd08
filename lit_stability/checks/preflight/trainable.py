"""Compares trainable and frozen parameters with the optimizer, the modes and the backward pass.

May import torch; does not import Lightning.
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
    """Finds trainable parameters without a gradient, before and after small steps.

    A bias without effect (of a key projection, or before a norm) always has a zero gradient; biases
    and other vectors are skipped if another parameter of the same module has a gradient.
    """
    unreached = [name for name, g in first.gradients.items() if g is None]
    zero = [n for n, g in first.gradients.items() if g == 0.0 and second.gradients[n] == 0.0]
    alive = {n.rpartition(".")[0] for n, g in second.gradients.items() if g}
    dimensions = {name: p.ndim for name, p in model.named_parameters()}
    zero = [n for n in zero if dimensions[n] > 1 or n.rpartition(".")[0] not in alive]
    findings = []
    if unreached:
        findings.append(
            Finding(
                check="gradients",
                severity="warning",
                what=f"the loss does not depend on {_count(unreached, 'trainable parameter')}",
                where=tuple(unreached),
                why="they will not train: they are unused, detached, or run under no_grad()",
                remedy="use them, or freeze them with requires_grad_(False)",
            )
        )
    if zero:
        findings.append(
            Finding(
                check="gradients",
                severity="warning",
                what=f"the gradients of {_count(zero, 'trainable parameter')} are exactly 0, even "
                "after small steps on all others",
                where=tuple(zero),
                why="they will not train: the modules after them are zero, saturated or masked out",
                remedy="check the first module after them whose output is zero or constant",
            )
        )
    return findings


def check_frozen(model: nn.Module, patterns: Sequence[str] = ()) -> list[Finding]:
    """Finds frozen modules in train mode, and trainable parameters that are meant to be frozen.

    Args:
        model: In the train and eval modes in which it will train.
        patterns: Names of parameters meant to be frozen, with wildcards, such as ``backbone.*``.

    Raises:
        NotApplicableError: If nothing is frozen or meant to be frozen.
        DeclarationError: If a pattern matches no parameter.
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
            why="it shows whether the backbone is frozen as intended",
            remedy="compare it with your intention",
        )
    )
    return findings + _frozen_in_train_mode(model)


def _meant_to_be_frozen(model: nn.Module, patterns: Sequence[str]) -> list[Finding]:
    names = dict(model.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise DeclarationError(
                f"frozen={pattern!r} matches no parameter; the first ones are {list(names)[:3]}"
            )
    meant = {n for pattern in patterns for n in fnmatch.filter(names, pattern)}
    trainable = [n for n in names if n in meant and names[n].requires_grad]
    if not trainable:
        return []
    return [
        Finding(
            check="frozen",
            severity="error",
            what=f"{_count(trainable, 'parameter')} meant to be frozen would train",
            where=tuple(trainable),
            why="the large first gradients of new heads destroy what the backbone has learnt",
            remedy="call requires_grad_(False) on them before the optimizer is built",
        )
    ]


def _frozen_in_train_mode(model: nn.Module) -> list[Finding]:
    """Finds frozen modules in train mode whose output depends on the mode."""
    by_effect: dict[str, list[str]] = {}
    for name, module in frozen_modules(model):
        for inner_name, inner in module.named_modules():
            effect = _effect(inner)
            if effect is not None:
                full_name = ".".join(filter(None, (name, inner_name)))
                by_effect.setdefault(effect, []).append(full_name)
    return [
        Finding(
            check="frozen",
            severity="warning",
            what=f"a frozen module is in train mode: {effect}",
            where=tuple(names),
            why="its output differs from its output after pretraining, and between two calls",
            remedy="call eval() on the frozen module at the start of every epoch (Lightning calls "
            "train() on the whole model), or override train()",
        )
        for effect, names in by_effect.items()
    ]


def _effect(module: nn.Module) -> str | None:
    """Returns the effect of train mode on a module, or None if there is none."""
    if not module.training:
        return None
    if isinstance(module, _DropoutNd):
        return "dropout is active" if module.p > 0 else None
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "running statistics are updated"
    return None


def frozen_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yields the outermost modules that have parameters, all of them frozen."""
    done: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if not parameters or any(p.requires_grad for p in parameters):
            continue
        if not any(name.startswith(f"{outer}.") for outer in done):
            done.append(name)
            yield name, module


def check_optimized(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Finding]:
    """Finds trainable parameters without an optimizer, and frozen or foreign ones in an optimizer.

    Raises:
        NotApplicableError: If there is no optimizer.
    """
    if not optimizers:
        raise NotApplicableError("there is no optimizer")
    optimized = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    missing = [n for n, p in named.items() if p.requires_grad and id(p) not in optimized]
    frozen = [n for n, p in named.items() if not p.requires_grad and id(p) in optimized]
    foreign = len(optimized - {id(p) for p in model.parameters()})
    findings = []
    if missing:
        findings.append(
            Finding(
                check="optimizer",
                severity="warning",
                what=f"no optimizer has {_count(missing, 'trainable parameter')}",
                where=tuple(missing),
                why="they get gradients, but are never updated",
                remedy="pass them to the optimizer, after the whole model is built, or freeze them",
            )
        )
    if foreign:
        findings.append(
            Finding(
                check="optimizer",
                severity="error" if foreign == len(optimized) else "warning",
                what=f"the optimizer has {foreign} parameters that are not in the model",
                why="it updates unused weights: the model was replaced after it was built",
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
                why="they do not train unless they are unfrozen later",
                remedy="remove them from the optimizer, unless you unfreeze them later",
            )
        )
    return findings


def check_registered(model: nn.Module) -> list[Finding]:
    """Finds trainable parameters in plain lists, tuples and dicts, which a module does not see."""
    registered = {id(p) for p in model.parameters()}
    hidden: dict[str, int] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or not isinstance(value, list | tuple | dict):
                continue
            found = {id(p): p for p in _parameters_in(value) if id(p) not in registered}
            if found:
                hidden[".".join(filter(None, (name, attribute)))] = len(found)
    if not hidden:
        return []
    count = sum(hidden.values())
    return [
        Finding(
            check="registered",
            severity="warning",
            what=f"{count} trainable {'parameter is' if count == 1 else 'parameters are'} in a "
            "plain list, tuple or dict",
            where=tuple(hidden),
            why="parameters() does not have them: they are neither trained, moved to the device, "
            "nor saved",
            remedy="use nn.ModuleList, nn.ModuleDict or nn.ParameterList; freeze what is hidden on "
            "purpose with requires_grad_(False)",
        )
    ]


def _parameters_in(value: Iterable[object]) -> Iterable[nn.Parameter]:
    """Yields the trainable parameters among the elements, and in modules among them."""
    for each in value.values() if isinstance(value, dict) else value:
        inner = each.parameters() if isinstance(each, nn.Module) else (each,)
        yield from (p for p in inner if isinstance(p, nn.Parameter) and p.requires_grad)


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"
