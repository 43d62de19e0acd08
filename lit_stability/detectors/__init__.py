"""Detectors: small state machines over floats that say when a step is not like the others.

``check(stats)`` looks; ``update(stats)`` learns, and is called for accepted steps only, so that a
flagged or non-finite value never enters a window. One instance serves one optimizer.
No file of this folder imports torch or Lightning.

A detector of your own is a class with four methods, and needs no registration. ``warn_only``
tells and does nothing; ``state_corrupted`` asks for a rollback; without either the step is vetoed.

>>> from lit_stability.measurement.step_stats import StepStats
>>> class TooGood:
...     '''Tells of a loss below what the task allows: the target is among the inputs.'''
...     def __init__(self, floor: float) -> None:
...         self.floor, self.told = floor, False
...     def check(self, stats: StepStats) -> Anomaly | None:
...         if self.told or not stats.loss < self.floor:
...             return None
...         message = f"loss {stats.loss:.3g} is below {self.floor}"
...         return Anomaly(kind="too good", step=stats.step, value=stats.loss, signal="loss",
...                        threshold=self.floor, warn_only=True, message=message)
...     def update(self, stats: StepStats) -> None:
...         self.told = self.told or stats.loss < self.floor
...     def state_dict(self) -> dict[str, bool]:
...         return {"told": self.told}
...     def load_state_dict(self, state: dict[str, bool]) -> None:
...         self.told = state["told"]
>>> losses = [2.3, 1.9, 0.01, 0.01]
>>> detector = TooGood(floor=0.1)
>>> for step, loss in enumerate(losses):
...     stats = StepStats(step=step, loss=loss, grad_norm=1.0)
...     if (anomaly := detector.check(stats)) is None or anomaly.warn_only:
...         detector.update(stats)
...     if anomaly is not None:
...         print(step, anomaly.message)
2 loss 0.01 is below 0.1

It is asked with the others by ``GradientMonitor(detectors=[*default_detectors(), TooGood(0.1)])``.
"""

from lit_stability.detectors.anomaly import Anomaly, Detector, Kind, flagged, with_damage
from lit_stability.detectors.attention_logits import AttentionLogits
from lit_stability.detectors.curvature import Curvature
from lit_stability.detectors.dead_gradients import DeadGradients
from lit_stability.detectors.detector_set import DetectorSet
from lit_stability.detectors.divergence import Divergence
from lit_stability.detectors.layer_bounds import LayerBounds
from lit_stability.detectors.loss_scale import LossScale
from lit_stability.detectors.lost_updates import LostUpdates
from lit_stability.detectors.nonfinite import NonFinite
from lit_stability.detectors.rank_agreement import Replicas, Vote, disagreement, rates_differ
from lit_stability.detectors.rolling_window import Window
from lit_stability.detectors.spike import Spike
from lit_stability.detectors.stalled_layers import Stall
from lit_stability.detectors.update import LearningRateJump, OptimizerState, UpdateSpike
from lit_stability.detectors.vanishing import Vanishing
from lit_stability.detectors.weight_corruption import WeightCorruption

__all__ = [
    "Anomaly",
    "AttentionLogits",
    "Curvature",
    "DeadGradients",
    "Detector",
    "DetectorSet",
    "Divergence",
    "Kind",
    "LayerBounds",
    "LearningRateJump",
    "LossScale",
    "LostUpdates",
    "NonFinite",
    "OptimizerState",
    "Replicas",
    "Spike",
    "Stall",
    "UpdateSpike",
    "Vanishing",
    "Vote",
    "WeightCorruption",
    "Window",
    "default_detectors",
    "disagreement",
    "flagged",
    "rates_differ",
    "with_damage",
]


def default_detectors() -> list[Detector]:
    """The detectors of a `GradientMonitor` that was given none, most certain first.

    From `LostUpdates` on they tell of what a run suffers silently, and nothing is done about it.
    """
    return [
        NonFinite(),
        LossScale(),
        OptimizerState(),
        UpdateSpike(),
        LearningRateJump(),
        Spike("grad_norm"),
        Divergence(),
        WeightCorruption(),
        LostUpdates(),
        DeadGradients(),
        Vanishing(),
        Stall(),
        AttentionLogits(),
        Curvature(),
    ]
