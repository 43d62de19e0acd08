"""One forward and backward pass, watched: what each module gave, what each parameter got.

A pass after small steps on every weight tells what stands still for now, as a head that starts at
zero lets nothing through at first, from what is dead. May import torch; knows no
Lightning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.checks.preflight.operations import Watch
from lit_stability.checks.preflight.subject import Subject, first_tensor

_STEPS = 2
"""Small steps before the second pass: of two matrices in a row that start at 0, the last moves
first, the other next."""
_NUDGE = 1e-3
"""Size of the small step: that of a first step of Adam at a common learning rate."""


@dataclass(frozen=True)
class Output:
    """What a module gave, over all of its elements."""

    rms: float
    """Root of the mean square."""
    finite: bool


@dataclass
class Observation:
    """What one pass showed."""

    loss: float = float("nan")
    outputs: dict[str, Output] = field(default_factory=dict)
    """By module, of the last call, in the order of completion."""
    gradients: dict[str, float | None] = field(default_factory=dict)
    """Norm by trainable parameter; None where the backward pass did not come by."""
    watch: Watch = field(default_factory=lambda: Watch(str), repr=False)
    """Facts about the operations."""


def observe(subject: Subject) -> tuple[Observation, Observation]:
    """Watch a pass, and one more after small steps down the gradients' signs.

    Raises:
        StepError: the step cannot be taken.
    """
    model = subject.model()
    first = _pass(subject, model)
    take_small_steps(subject, model)
    return first, _pass(subject, model)


def take_small_steps(subject: Subject, model: nn.Module) -> None:
    """Move what stands still for now: small steps down the gradients' signs.

    Args:
        subject: whose step is taken.
        model: a copy made by it, changed in place; gradients that it has are those of the first.

    Raises:
        StepError: the step cannot be taken.
        NotApplicableError: there is no step that could be tried.
    """
    for step in range(_STEPS):
        if step > 0 or all(p.grad is None for p in model.parameters()):
            model.zero_grad(set_to_none=True)
            subject.backward(model, subject.loss(model))
        _nudge(model)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def _nudge(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            sign = _dense(parameter.grad).nan_to_num(0.0).sign()
            parameter.sub_(sign, alpha=_NUDGE)


def _pass(subject: Subject, model: nn.Module) -> Observation:
    seen = Observation()
    with running(model) as stack:
        seen.watch = Watch(lambda: stack[-1] if stack else "")
        with _outputs(model, seen.outputs), seen.watch:
            loss = subject.loss(model)
    seen.loss = float(loss.detach())
    subject.backward(model, loss)
    seen.gradients = {
        name: None if p.grad is None else float(_dense(p.grad).float().norm())
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return seen


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose ``forward`` is running, the innermost last."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        enter = _Push(stack, name)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Push:
    """A hook that notes that a module begins to run."""

    def __init__(self, stack: list[str], name: str) -> None:
        self._stack, self._name = stack, name

    def __call__(self, *_: Any) -> None:
        self._stack.append(self._name)


@contextlib.contextmanager
def _outputs(model: nn.Module, into: dict[str, Output]) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.numel():
                rms = float(tensor.float().square().mean().sqrt())
                into[name] = Output(rms, bool(tensor.isfinite().all()))

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The top-level modules that hold parameters; a lone wrapper is looked through.

    >>> list(parts(nn.ModuleDict({"net": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))})))
    ['net.0', 'net.1']
    """
    prefix, children = "", _holding(model)
    while len(children) == 1:
        name, only = children[0]
        if not (inner := _holding(only)) or next(only.parameters(recurse=False), None) is not None:
            break
        prefix, children = f"{prefix}{name}.", inner
    return {f"{prefix}{name}": child for name, child in children}


def _holding(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, child)
        for name, child in model.named_children()
        if next(child.parameters(), None) is not None
    ]
