"""What can be done about an anomaly: values, for others to carry out.

Data only: no torch, no Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class RetryStep:
    """Veto the update and take the very same step again: nothing is blamed yet."""


@dataclass(frozen=True)
class SkipStep:
    """Veto the update and leave the batch out: all stays as if it had not come."""


@dataclass(frozen=True)
class HoldLearningRate:
    """Scale the learning rate of each group down until its schedule comes back; take the step."""

    factors: tuple[float, ...]
    """What brings each group back to the learning rate of the step before."""


@dataclass(frozen=True)
class RollBack:
    """Put a confirmed snapshot back, and go on with these factors."""

    lr_factor: float = 1.0
    """What the learning rate is multiplied by from now on, on top of earlier cuts."""
    clip_factor: float = 1.0
    """What the clipping threshold is multiplied by from now on."""
    replay: bool = False
    """Train on the batches since the snapshot again, instead of on new ones."""
    leave_out: bool = False
    """Replay without the batch that is suspected."""
    older: bool = False
    """Go back to the snapshot before the newest confirmed one."""


@dataclass(frozen=True)
class LowerPrecision:
    """Compute in a precision that holds more numbers from the next step on."""

    was: str
    """Precision so far, by Lightning's name."""
    precision: str


@dataclass(frozen=True)
class KeepInFloat32:
    """Compute one module in float32 from the next step on."""

    module: str


@dataclass(frozen=True)
class AcceptNewRegime:
    """Take the values that stay for the new normal, and learn anew what is usual."""


@dataclass(frozen=True)
class Stop:
    """Give up: no response in budget is left."""

    reason: str


Response: TypeAlias = (
    RetryStep
    | SkipStep
    | HoldLearningRate
    | RollBack
    | LowerPrecision
    | KeepInFloat32
    | AcceptNewRegime
    | Stop
)


def describe(response: Response) -> str:
    """A few words for the log.

    >>> describe(RollBack(0.5, 0.5))
    'rolled back, learning rate x0.5, clip x0.5'
    """
    match response:
        case RetryStep():
            return "step taken again"
        case SkipStep():
            return "step skipped"
        case HoldLearningRate(factors):
            return f"learning rate held, x{min(factors):.3g}"
        case RollBack(lr, clip, replay, leave_out, older):
            words = "rolled back" + (" further" if older else "") + (" and replayed" * replay)
            words += " without the suspect" if leave_out else ""
            words += f", learning rate x{lr:.3g}" if lr < 1 else ""
            return words + (f", clip x{clip:.3g}" if clip < 1 else "")
        case LowerPrecision(was, precision):
            return f"precision {was} -> {precision}"
        case KeepInFloat32(module):
            return f"fp32 island {module}"
        case AcceptNewRegime():
            return "accepted as the new normal"
        case Stop(reason):
            return f"stopped: {reason}"
