"""Observes forward and backward passes: the output of each module, the gradient of each parameter.

A head that starts at zero passes no gradient at first. A second pass, after small steps on all
weights, distinguishes such modules from dead ones. May import torch; does not import Lightning.
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
"""Small steps before the second pass: of two successive matrices that start at 0, the last one
changes in the first step, the other one in the second."""
_NUDGE = 1e-3
"""Size of the small steps: that of a first step of Adam at a common learning rate."""


@dataclass(frozen=True)
class Output:
    """Statistics of all elements of a module's output."""

    rms: float
    """Root mean square."""
    finite: bool


@dataclass
class Observation:
    """Measurements of one forward and backward pass."""

    loss: float = float("nan")
    outputs: dict[str, Output] = field(default_factory=dict)
    """Output of the last call of each module, in the order in which the calls end."""
    gradients: dict[str, float | None] = field(default_factory=dict)
    """Gradient norm of each trainable parameter; None if the loss does not depend on it."""
    watch: Watch = field(default_factory=lambda: Watch(str), repr=False)
    """Facts about the operations of the forward pass."""


def observe(subject: Subject) -> tuple[Observation, Observation]:
    """Observes a pass, and a second one after small steps against the signs of the gradients.

    Raises:
        StepError: If the step fails.
    """
    model = subject.model()
    first = _pass(subject, model)
    take_small_steps(subject, model)
    return first, _pass(subject, model)


def take_small_steps(subject: Subject, model: nn.Module) -> None:
    """Takes small steps against the signs of the gradients, so that zero-initialised parts change.

    Args:
        subject: Runs the step.
        model: A copy made by the subject, changed in place; if it has gradients, the first small
            step uses them.

    Raises:
        StepError: If the step fails.
        NotApplicableError: If the step cannot be run for a check.
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
    heads: list[str] = []
    with running(model) as stack:
        seen.watch = Watch(lambda: stack[-1] if stack else "", lambda: next(reversed(heads), ""))
        with _outputs(model, seen.outputs, heads), seen.watch:
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
    """Yields a list of the modules whose ``forward`` is running, innermost last."""
    stack: list[str] = []

    def pop(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_Push(stack, name)))
        handles.append(module.register_forward_hook(pop, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Push:
    """A forward pre-hook that adds a module's name to the stack of running modules."""

    def __init__(self, stack: list[str], name: str) -> None:
        self._stack, self._name = stack, name

    def __call__(self, *_: Any) -> None:
        self._stack.append(self._name)


@contextlib.contextmanager
def _outputs(model: nn.Module, into: dict[str, Output], heads: list[str]) -> Iterator[None]:
    """Keeps the output of each module, and the names of modules with weights as they end."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            if next(module.parameters(recurse=False), None) is not None:
                heads[:] = [name]
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
    """Returns the top-level modules with parameters; a module that only wraps one other is skipped.

    >>> list(parts(nn.ModuleDict({"net": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))})))
    ['net.0', 'net.1']
    """
    prefix, children = "", _with_parameters(model)
    while len(children) == 1:
        name, only = children[0]
        inner = _with_parameters(only)
        if not inner or next(only.parameters(recurse=False), None) is not None:
            break
        prefix, children = f"{prefix}{name}.", inner
    return {f"{prefix}{name}": child for name, child in children}


def _with_parameters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, child)
        for name, child in model.named_children()
        if next(child.parameters(), None) is not None
    ]
