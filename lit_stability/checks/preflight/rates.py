"""One update on a copy: whether the learning rate tears the weights, or leaves them where they are.

May import torch; knows no Lightning.
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
"""An update as large as the weights themselves leaves nothing of the initialisation."""
LARGE = 0.1
"""A tenth of the weights in one step, after which the loss is no lower; 0.001 is usual, a first
step of Adam at 1e-3 is at 0.05 of normal draws of 0.02."""
NONE = 1e-7
"""Below the rounding of fp32, 1.2e-7, weights stay where they are to the bit."""
STILL = 1e-3
"""A thousandth of the weights in a whole run: fine-tuning at 1e-6 does so in twenty steps."""
_FEW = 50
"""Planned steps below which a run is a trial, of which nothing is asked."""
WORSE = 3.0
"""Factor on the loss of the very batch that the step went down on. A step that overshoots into the
mirror image of where it was leaves the loss as it was; three times as much is beyond doubt."""
_AHEAD = 1000
"""Steps for which schedulers are followed."""


@dataclass(frozen=True)
class Update:
    """What one step did to a copy."""

    ratio: float
    """Norm of the change of all matrices over their norm."""
    before: float
    """Loss."""
    after: float
    """Loss of the same batch under the same random numbers."""


def check_rates(subject: Subject) -> list[Finding]:
    """Take one step at the first learning rate, and one at the highest of the warm-up.

    Both are held against the weights; the second also against the steps that are planned.

    Raises:
        NotApplicableError: there is no optimizer, more than one, or one that needs a closure.
    """
    if len(subject.optimizers) != 1:
        raise NotApplicableError(f"there are {len(subject.optimizers)} optimizers, not one")
    if isinstance(subject.optimizers[0], torch.optim.LBFGS):
        raise NotApplicableError("LBFGS searches for its step itself")
    first = [float(g["lr"]) for g in subject.optimizers[0].param_groups]
    peak = peak_rates(subject, _AHEAD)
    if max(peak) == 0.0:
        return [_dead(f"the learning rate is 0, and stays so for {_AHEAD} steps")]
    if max(first) > 0:
        done = update(subject, first)
        if findings := _judge(done, max(first)):
            return findings
    if max(peak) > max(first):
        done = update(subject, peak)
        if findings := _judge_peak(done, max(peak)):
            return findings
    if done.ratio < NONE:
        return [_dead(f"an update at {max(peak):.3g}, the highest learning rate, moves no weight")]
    if subject.steps >= _FEW and done.ratio * subject.steps < STILL:
        return [_still(done, max(peak), subject.steps)]
    return []


def _still(done: Update, rate: float, steps: float) -> Finding:
    return Finding(
        check="learning rate",
        severity="warning",
        what=f"at {rate:.3g}, the highest learning rate, an update is {done.ratio:.2g} of the "
        f"weights; all {steps:.0f} planned steps together come to {done.ratio * steps:.2g} at most",
        why="the model is as good as dead: the run ends where it began",
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
            why="steps of that size leave the region in which the gradient means anything",
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
            why="a warm-up ends there, and gradients seldom shrink enough meanwhile",
            remedy="lower the highest learning rate of the schedule",
        )
    ]


def _dead(what: str) -> Finding:
    return Finding(
        check="learning rate",
        severity="error",
        what=what,
        why="the model is dead: nothing will be learnt, whatever the loss shows",
        remedy="raise the learning rate; look for a schedule that multiplies it by 0, and for "
        "weights "
        "in half precision, which small updates round away",
    )


def update(subject: Subject, rates: Sequence[float]) -> Update:
    """Take one step on copies.

    Args:
        subject: with one optimizer.
        rates: learning rate of each of its groups.

    Raises:
        NotApplicableError: the loss is not finite, or all weights are 0, of which no share can be
            told.
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
        moved = _norm([p - was for p, was in zip(weights, old, strict=True)])
        after = float(subject.loss(model))
    size = _norm(old)
    if size == 0.0:
        raise NotApplicableError("all matrices are 0, and no share of them can be told")
    return Update(moved / size, float(before.detach()), after)


def peak_rates(subject: Subject, steps: int) -> list[float]:
    """The highest learning rate of each group within some steps, by running copies of schedulers.

    Schedulers that ask for a metric are not followed, as they only lower the rate.
    """
    original = subject.optimizers[0]
    memo: dict[int, Any] = {id(p): p for group in original.param_groups for p in group["params"]}
    optimizer = copy.deepcopy(original, memo)  # with the very parameters: none is moved
    schedulers = [
        copy.deepcopy(each, memo) for each in subject.schedulers if isinstance(each, LRScheduler)
    ]
    best = [float(g["lr"]) for g in optimizer.param_groups]
    for _ in range(steps if schedulers else 0):
        if not _advance(schedulers):
            break
        rates = [float(g["lr"]) for g in optimizer.param_groups]
        best = [max(pair) for pair in zip(best, rates, strict=True)]
    return best


def _advance(schedulers: Sequence[LRScheduler]) -> bool:
    """Step schedulers; False where one is at its end, as OneCycle, or asks for a metric."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that the optimizer did not take
        try:
            for scheduler in schedulers:
                scheduler.step()
        except (ValueError, TypeError):
            return False
    return True


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.hypot(*(float(nn.utils.get_total_norm([t.float()])) for t in tensors))
