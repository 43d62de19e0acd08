"""Responses to an anomaly, as values that callbacks carry out.

Data only: no torch, no Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class RetryStep:
    """Rejects the update and runs the same step again, before anything is blamed."""

    new_random_numbers: bool = False
    """Whether the step draws other random numbers this time."""
    next_index: bool = False
    """Whether the batch gets the index of the batch after it this time."""


@dataclass(frozen=True)
class SkipStep:
    """Rejects the update and skips the batch: the state is as if the batch had not been drawn."""

    new_random_numbers: bool = False
    """Whether the next batch draws other random numbers than the skipped one."""


@dataclass(frozen=True)
class ClipStep:
    """Clips the gradients to their usual norm and takes the step."""


@dataclass(frozen=True)
class HoldLearningRate:
    """Scales the learning rate of each group down until its schedule falls; accepts the step."""

    factors: tuple[float, ...]
    """Factor that restores the learning rate of the previous step, for each group."""


@dataclass(frozen=True)
class RollBack:
    """Restores a confirmed snapshot and continues with these factors."""

    lr_factor: float = 1.0
    """Factor on the learning rate from now on, in addition to earlier cuts."""
    clip_factor: float = 1.0
    """Factor on the clipping threshold from now on."""
    replay: bool = False
    """Train on the batches since the snapshot again instead of on new ones."""
    skip_suspect: bool = False
    """Skip the suspected batch in the replay."""
    older: bool = False
    """Restore the snapshot before the newest confirmed one."""


@dataclass(frozen=True)
class LowerPrecision:
    """Computes in a precision with a larger range from the next step on."""

    was: str
    """Lightning's name of the precision so far."""
    precision: str


@dataclass(frozen=True)
class KeepInFloat32:
    """Computes one module in float32 from the next step on."""

    module: str


@dataclass(frozen=True)
class AcceptNewRegime:
    """Accepts values that persist as the new normal; baselines are learned from scratch."""


@dataclass(frozen=True)
class Stop:
    """Ends the fit: no response in budget is left."""

    reason: str


Response: TypeAlias = (
    RetryStep
    | SkipStep
    | ClipStep
    | HoldLearningRate
    | RollBack
    | LowerPrecision
    | KeepInFloat32
    | AcceptNewRegime
    | Stop
)


def describe(response: Response) -> str:
    """Returns a short description for logs and records.

    >>> describe(RollBack(0.5, 0.5))
    'rolled back, learning rate x0.5, clip x0.5'
    """
    match response:
        case RetryStep(new, next_index):
            words = "step retried" + " with new random numbers" * new
            return words + " at the next batch index" * next_index
        case SkipStep():
            return "step skipped"
        case ClipStep():
            return "gradients clipped"
        case HoldLearningRate(factors):
            return f"learning rate held, x{min(factors):.3g}"
        case RollBack(lr, clip, replay, skip_suspect, older):
            words = "rolled back" + (" further" if older else "") + (" and replayed" * replay)
            words += " without the suspect" if skip_suspect else ""
            words += f", learning rate x{lr:.3g}" if lr < 1 else ""
            return words + (f", clip x{clip:.3g}" if clip < 1 else "")
        case LowerPrecision(was, precision):
            return f"precision {was} -> {precision}"
        case KeepInFloat32(module):
            return f"{module} kept in fp32"
        case AcceptNewRegime():
            return "accepted as the new normal"
        case Stop(reason):
            return f"stopped: {reason}"
