"""Overfits a copy of the model on a few samples, which a working model does within seconds.

A model that cannot has a fault between its input and its loss that more data does not fix. May
import torch; does not import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.operations import WithoutDropout, quiet_dropout
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.checks.preflight.subject import Subject
from lit_stability.measurement.tensor_tree import named_tensors


@dataclass(frozen=True, kw_only=True)
class Memorise:
    """Settings of the memorisation check.

    Dropout and label smoothing are disabled; the learning rate is constant.

    Raises:
        ValueError: If an option is out of range.
    """

    samples: int = 20
    """Number of samples from the first batch; all samples if it has fewer."""
    steps: int = 200
    """Largest number of steps; training ends earlier if the loss is low enough."""
    fraction: float = 0.1
    """The loss must fall below this share of the first loss."""
    lr: float = 1e-3
    """Learning rate of the optimizer."""
    optimizer: Callable[..., Optimizer] = AdamW
    """Called with the parameters and ``lr=``."""
    clip: float = 1.0
    """Gradients are clipped to this total norm."""

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be between 0 and 1")


def check_memory(subject: Subject, plan: Memorise | None) -> list[Finding]:
    """Trains a copy on a few samples and checks that the loss falls.

    Raises:
        NotApplicableError: If `plan` is None.
    """
    if plan is None:
        raise NotApplicableError("it runs many steps; enable it with memorise=Memorise()")
    samples = take(subject.batch, plan.samples)
    model = subject.model()
    quiet_dropout(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = plan.optimizer(weights, lr=plan.lr)
    first = last = float("nan")
    with WithoutDropout():
        for step in range(plan.steps + 1):
            loss = subject.loss(model, samples)
            last = float(loss.detach())
            first = last if step == 0 else first
            if last < plan.fraction * first or step == plan.steps:
                break
            _step(subject, model, loss, optimizer, weights, plan.clip)
    if last < plan.fraction * first:
        return []
    return [
        Finding(
            check="memorise",
            severity="error",
            what=f"{plan.samples} samples are not memorised: the loss goes from {first:.4g} "
            f"to {last:.4g} in {plan.steps} steps, not below {100 * plan.fraction:.3g} %",
            why="a model that cannot overfit a few samples cannot fit more",
            remedy="fix the other findings first; then check the labels (do equal inputs have "
            "different ones?), the masks and the frozen parts; try more steps, or another lr",
        )
    ]


def _step(
    subject: Subject,
    model: nn.Module,
    loss: Tensor,
    optimizer: Optimizer,
    weights: Iterable[Tensor],
    clip: float,
) -> None:
    optimizer.zero_grad()
    subject.backward(model, loss)
    torch.nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()


def take(batch: Any, count: int) -> Any:
    """Returns the first samples of a batch; tensors with another first dimension are not cut.

    >>> [len(t) for t in take((torch.zeros(8, 3), torch.zeros(8), torch.zeros(5)), 2)]
    [2, 2, 5]
    """
    sizes = [len(tensor) for _, tensor in named_tensors(batch) if tensor.ndim]
    rows = sizes[0] if sizes else 0

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count] if value.ndim and len(value) == rows else value
        if isinstance(value, Mapping):
            return type(value)({k: cut(v) for k, v in value.items()})  # type: ignore[call-arg]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cut, value))
        if isinstance(value, (list, tuple)):
            others = [v for v in value if not isinstance(v, Tensor)]
            one_per_sample = len(value) == rows and len(others) == rows
            return type(value)(value[:count]) if one_per_sample else type(value)(map(cut, value))
        return value

    return cut(batch)
