"""Runs one update on a copy to find learning rates that are far too high or too low.

May import torch; does not import Lightning.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.checks.preflight.subject import Subject

TORN = 1.0
"""Relative update above which nothing of the initialisation remains."""
LARGE = 0.1
"""Relative update that is too large if the loss does not fall. 0.001 is usual; the first step of
Adam at 1e-3 on normal weights with standard deviation 0.02 is 0.05."""
NONE = 1e-7
"""Relative update below the rounding of fp32, 1.2e-7: the weights stay bitwise unchanged."""
STILL = 1e-3
"""Relative update of a whole run that is too small: fine-tuning at 1e-6 exceeds it in 20 steps."""
_FEW = 50
"""Planned steps below which a run counts as a test run, whose total update is not judged."""
WORSE = 3.0
"""Factor on the loss of the batch that the step was computed from. A step that overshoots to the
opposite side of the minimum leaves the loss unchanged, so a factor of three is clearly too much."""
_AHEAD = 1000
"""Number of steps for which schedulers are simulated."""


@dataclass(frozen=True)
class Update:
    """The effect of one step on a copy."""

    ratio: float
    """Relative update: norm of the change of all matrices, divided by their norm."""
    before: float
    """Loss before the step."""
    after: float
    """Loss after the step, on the same batch with the same random numbers."""


def check_rates(subject: Subject) -> list[Finding]:
    """Takes one step at the first learning rate, and one at the highest of the warm-up.

    Both updates are compared with the weights. The one at the highest rate must also be large
    enough for the number of planned steps.

    Raises:
        NotApplicableError: If there is not exactly one optimizer, or it is LBFGS.
    """
    if len(subject.optimizers) != 1:
        raise NotApplicableError(f"there are {len(subject.optimizers)} optimizers; it needs one")
    if isinstance(subject.optimizers[0], torch.optim.LBFGS):
        raise NotApplicableError("LBFGS chooses its step size itself")
    first = [float(g["lr"]) for g in subject.optimizers[0].param_groups]
    peak = peak_rates(subject, _AHEAD)
    if max(peak) == 0.0:
        return [_dead(f"the learning rate is 0, and stays 0 for {_AHEAD} steps")]
    if max(first) > 0:
        done = update(subject, first)
        if findings := _judge(done, max(first)):
            return findings
    if max(peak) > max(first):
        done = update(subject, peak)
        if findings := _judge_peak(done, max(peak)):
            return findings
    if done.ratio < NONE:
        return [
            _dead(f"an update at {max(peak):.3g}, the highest learning rate, changes no weight")
        ]
    if subject.steps >= _FEW and done.ratio * subject.steps < STILL:
        return [_still(done, max(peak), subject.steps)]
    return []


def _still(done: Update, rate: float, steps: float) -> Finding:
    return Finding(
        check="learning rate",
        severity="warning",
        what=f"at {rate:.3g}, the highest learning rate, an update is {done.ratio:.2g} of the "
        f"weights; all {steps:.0f} planned steps together come to {done.ratio * steps:.2g} at most",
        why="the weights hardly change during the whole run",
        remedy="raise the learning rate, or plan more steps",
    )


def _judge(done: Update, rate: float) -> list[Finding]:
    worse = not done.after <= WORSE * abs(done.before)
    rose = not done.after < done.before
    if not worse and done.ratio <= (LARGE if rose else TORN):
        return []
    return [
        Finding(
            check="learning rate",
            severity="error" if worse or (rose and done.ratio > TORN) else "warning",
            what=f"the first update, at a learning rate of {rate:.3g}, is {done.ratio:.3g} of the "
            f"weights; on the same batch the loss goes from {done.before:.4g} to {done.after:.4g}",
            why="steps of this size leave the region in which the gradient is meaningful",
            remedy="lower the learning rate, or warm it up",
        )
    ]


def _judge_peak(done: Update, rate: float) -> list[Finding]:
    if done.ratio <= TORN and math.isfinite(done.after):
        return []
    return [
        Finding(
            check="learning rate",
            severity="warning",
            what=f"at {rate:.3g}, the highest learning rate of the first {_AHEAD} steps, an update "
            f"would be {done.ratio:.3g} of the weights now",
            why="the warm-up reaches this rate, and gradients rarely shrink enough before it does",
            remedy="lower the highest learning rate of the schedule",
        )
    ]


def _dead(what: str) -> Finding:
    return Finding(
        check="learning rate",
        severity="error",
        what=what,
        why="no weight changes, so the model does not learn, whatever the loss shows",
        remedy="raise the learning rate; look for a schedule that multiplies it by 0, and for "
        "weights in half precision, in which small updates round to nothing",
    )


def update(subject: Subject, rates: Sequence[float]) -> Update:
    """Takes one step on copies of the model and its optimizer.

    Args:
        subject: With one optimizer.
        rates: Learning rate of each parameter group.

    Raises:
        NotApplicableError: If the loss is not finite, or all matrices are 0, so that the relative
            update is undefined.
    """
    model, (optimizer,) = subject.model_and_optimizers()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    before = subject.loss(model)
    if not bool(before.isfinite()):
        raise NotApplicableError("the first loss is not finite")
    subject.backward(model, before)
    if subject.clip is not None:
        subject.clip(model, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1] or trained
    old = [p.detach().clone() for p in weights]
    optimizer.step()
    with torch.no_grad():
        change = _norm([p - previous for p, previous in zip(weights, old, strict=True)])
        after = float(subject.loss(model))
    size = _norm(old)
    if size == 0.0:
        raise NotApplicableError("all matrices are 0, so the relative update is undefined")
    return Update(change / size, float(before.detach()), after)


def peak_rates(subject: Subject, steps: int) -> list[float]:
    """Returns the highest learning rate of each group within `steps`, from copies of schedulers.

    Schedulers that need a metric are not simulated, because they only lower the rate.
    """
    original = subject.optimizers[0]
    memo: dict[int, Any] = {id(p): p for group in original.param_groups for p in group["params"]}
    optimizer = copy.deepcopy(original, memo)  # shares the parameters, as no step is taken
    schedulers = [
        copy.deepcopy(scheduler, memo)
        for scheduler in subject.schedulers
        if isinstance(scheduler, LRScheduler)
    ]
    best = [float(g["lr"]) for g in optimizer.param_groups]
    for _ in range(steps if schedulers else 0):
        if not _advance(schedulers):
            break
        rates = [float(g["lr"]) for g in optimizer.param_groups]
        best = [max(pair) for pair in zip(best, rates, strict=True)]
    return best


def _advance(schedulers: Sequence[LRScheduler]) -> bool:
    """Steps all schedulers; returns False if one has ended (OneCycleLR) or needs a metric."""
    with warnings.catch_warnings():
        # Schedulers warn that the optimizer took no step; a deprecation is not hidden.
        warnings.simplefilter("ignore", UserWarning)
        try:
            for scheduler in schedulers:
                scheduler.step()
        except (ValueError, TypeError):
            return False
    return True


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.hypot(*(float(nn.utils.get_total_norm([t.float()])) for t in tensors))
