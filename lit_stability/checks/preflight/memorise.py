"""Learning a few samples by heart: what a model that works does in seconds.

One that cannot has a fault between its input and its loss that no amount of data mends. May import
torch; knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.inputs import named_tensors
from lit_stability.checks.preflight.operations import WithoutDropout, quiet_dropout
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.checks.preflight.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Memorise:
    """How much is to be learnt by heart, and in what time.

    Dropout and label smoothing are off, the learning rate is constant.

    Raises:
        ValueError: an option is out of its range.
    """

    samples: int = 20
    """Samples of the first batch; all, if it has fewer."""
    steps: int = 200
    """Steps at most; fewer, once the loss is low enough."""
    fraction: float = 0.1
    """Share of the first loss that the loss must fall below."""
    lr: float = 1e-3
    """Of the optimizer."""
    optimizer: Callable[..., Optimizer] = AdamW
    """Called with parameters and ``lr=``."""
    clip: float = 1.0
    """Largest norm of a gradient."""

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be between 0 and 1")


def check_memory(subject: Subject, plan: Memorise | None) -> list[Finding]:
    """Train a copy on a few samples and see whether the loss falls.

    Raises:
        NotApplicableError: it is not asked for.
    """
    if plan is None:
        raise NotApplicableError("it costs steps; ask for it with memorise=Memorise()")
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
            what=f"{plan.samples} samples are not learnt by heart: the loss goes from {first:.4g} "
            f"to {last:.4g} in {plan.steps} steps, not below {100 * plan.fraction:.3g} %",
            why="a model that cannot overfit a handful of samples will not fit more",
            remedy="look at the other findings first; then at the labels (do equal inputs have "
            "different ones?), the masks and what is frozen; try more steps, or another lr",
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
    """The first samples of a batch; tensors of another first dimension are left whole.

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
            rest = [v for v in value if not isinstance(v, Tensor)]
            parallel = len(value) == rows and len(rest) == rows
            return type(value)(value[:count]) if parallel else type(value)(map(cut, value))
        return value

    return cut(batch)
