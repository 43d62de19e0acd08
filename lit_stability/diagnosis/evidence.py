"""What can speak for a cause: each clue reads a scene and says what it saw, or nothing.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

import math

from lit_stability.diagnosis.cause import Clue
from lit_stability.diagnosis.context import EARLY, LARGE, STALE, Scene
from lit_stability.diagnosis.layer_types import is_norm_gain


def kind(*kinds: str) -> Clue:
    """The anomaly is of one of these kinds."""

    def clue(scene: Scene) -> str | None:
        return scene.anomaly.message if scene.anomaly.kind in kinds else None

    return clue


def signal(*signals: str) -> Clue:
    """The anomaly is of one of these signals."""

    def clue(scene: Scene) -> str | None:
        return scene.anomaly.message if scene.anomaly.signal in signals else None

    return clue


def pattern(*names: str) -> Clue:
    """The loss went wrong in one of these patterns."""

    def clue(scene: Scene) -> str | None:
        found = scene.pattern
        return f"{found.name}: {found.text}" if found and found.name in names else None

    return clue


def reading(quantity: str, above: float, words: str) -> Clue:
    """A probe's last reading is above a bound; ``words`` say it, with value and place."""

    def clue(scene: Scene) -> str | None:
        found = scene.reading(quantity)
        if found is None or not found[1] > above:
            return None
        return words.format(where=found[0], value=found[1])

    return clue


def both(first: Clue, second: Clue) -> Clue:
    """Two clues that say something together only."""

    def clue(scene: Scene) -> str | None:
        said = first(scene)
        other = None if said is None else second(scene)
        if other is None or other == said:
            return other
        return f"{said}, and {other}"

    return clue


def early(scene: Scene) -> str | None:
    """It is one of the first steps."""
    step = scene.anomaly.step
    return f"step {step} is before step {EARLY}" if step < EARLY else None


def no_warmup(scene: Scene) -> str | None:
    """The learning rate began at its largest."""
    return None if scene.rate_rose else "the learning rate has never risen: there was no warm-up"


def warming_up(scene: Scene) -> str | None:
    """The learning rate is at its highest so far."""
    return "the learning rate is still rising" if scene.phase == "warm-up" else None


def large_gradient(scene: Scene) -> str | None:
    """The gradient is far above its median."""
    ratio = scene.gradient_ratio
    if ratio is None or not ratio > LARGE:
        return None
    return f"the gradient norm is {ratio:.3g} times its median"


def ordinary_gradient(scene: Scene) -> str | None:
    """The gradient is as ever."""
    ratio = scene.gradient_ratio
    if ratio is None or not ratio <= LARGE:
        return None
    return f"the gradient norm is ordinary, {ratio:.2g} times its median"


def large_update(scene: Scene) -> str | None:
    """The weights move faster than they did."""
    excess = scene.update_excess
    if excess is None or not 3 < excess < math.inf:
        return None
    return f"the last update was {excess:.3g} times the usual"


def stale_moments(scene: Scene) -> str | None:
    """Gradients had outgrown Adam's second moment just before."""
    seen = [(s.moment_rms, s.step) for s in scene.history[-20:] if s.moment_rms]
    highest, step = max(seen, default=(0.0, 0))
    if highest <= STALE:
        return None
    return f"at step {step} the gradients were {highest:.2g} times Adam's second moment"


def rate_changed(scene: Scene) -> str | None:
    """The scheduler has changed the learning rate by a factor of three or more of late."""
    rates = [rate for rate in scene.rates[-20:] if rate > 0]
    if len(rates) < 2 or max(rates) < 3 * min(rates):
        return None
    return f"the learning rate went from {rates[0]:.3g} to {rates[-1]:.3g} of late"


def transient(scene: Scene) -> str | None:
    """It did not come back."""
    same = "it did not return when the same steps were taken again"
    return same if scene.verdict == "transient" else None


def deterministic(scene: Scene) -> str | None:
    """It came back."""
    same = "it returned when the same steps were taken again"
    return same if scene.verdict == "deterministic" else None


def other_batches(scene: Scene) -> str | None:
    """Several batches in a row struck: they cannot all be bad."""
    batches = (scene.strikes + 1) // 2
    return f"it struck with {batches} batches in a row" if batches >= 5 else None


def bad_input(scene: Scene) -> str | None:
    """The batch itself is not as it should be; what took many steps is not the work of one."""
    if scene.anomaly.observe_only:
        return None
    if scene.batch:
        return f"in the batch, {'; '.join(scene.batch)}"
    origin = scene.origin
    return origin.describe().splitlines()[0] if origin and origin.cause == "input" else None


def bad_state(scene: Scene) -> str | None:
    """A weight or buffer was bad before the step."""
    origin = scene.origin
    if not origin or origin.cause not in ("parameter", "buffer"):
        return None
    return f"{origin.tensor} was non-finite before the step"


def overflow(scene: Scene) -> str | None:
    """An operation is finite in float32 and not in the format at work."""
    origin = scene.origin
    return origin.describe().splitlines()[0] if origin and origin.overflow else None


def operation(scene: Scene) -> str | None:
    """An operation made a NaN or Inf of finite values, and would in float32 as well."""
    origin = scene.origin
    if not origin or origin.cause != "operation" or origin.overflow:
        return None
    return str(origin.describe().splitlines()[0])


def mixed_precision(scene: Scene) -> str | None:
    """Forward and backward compute in 16 bits."""
    return f"it computes in {scene.precision}" if scene.mixed else None


def accumulates(scene: Scene) -> str | None:
    """Gradients are accumulated, by the module itself or by the Trainer."""
    if scene.manual:
        return "the module steps its optimizers itself"
    more = scene.accumulation > 1
    return f"gradients of {scene.accumulation} batches are added up" if more else None


def high_momentum(scene: Scene) -> str | None:
    """The momentum is above what is usual."""
    high = scene.momentum is not None and scene.momentum > 0.95
    return f"the momentum is {scene.momentum:g}" if high else None


def unclipped(scene: Scene) -> str | None:
    """The Trainer does not clip."""
    return None if scene.clips else "gradients are not clipped"


def zero_gain(scene: Scene) -> str | None:
    """A norm layer's gain is exactly 0 and gets no gradient that could move it."""
    shut = scene.anomaly.layers[:1] if scene.anomaly.signal == "weight_norm" else ()
    return next((f"{name} is exactly 0" for name, _ in shut if is_norm_gain(name)), None)


GROWS = pattern("exponential growth")
SWINGS = pattern("oscillating divergence")
JUMPS = pattern("sudden jump")
BROKEN = kind("non-finite loss", "non-finite gradient", "non-finite weight")
DAMAGE = kind("non-finite weight", "weight corruption")
DIVERGES = kind("divergence", "oscillation")
SPIKES = kind("gradient spike", "loss spike")
