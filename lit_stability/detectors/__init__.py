"""Detectors: small state machines over floats that flag abnormal optimizer steps.

``check(stats)`` judges a step and ``update(stats)`` learns from it. `update` is called for accepted
steps only, so a flagged or non-finite value never enters a window. One instance serves one
optimizer. No file of this folder imports torch or Lightning.

A custom detector is a class with four methods and needs no registration. An anomaly with
``warn_only`` is only reported; one with ``state_corrupted`` asks for a rollback; for any other the
step is skipped.

>>> from lit_stability.measurement.step_stats import StepStats
>>> class TooGood:
...     '''Warns, once, of a loss below what the task allows: the target leaks into the inputs.'''
...     def __init__(self, floor: float) -> None:
...         self.floor, self.reported = floor, False
...     def check(self, stats: StepStats) -> Anomaly | None:
...         if self.reported or not stats.loss < self.floor:
...             return None
...         message = f"loss {stats.loss:.3g} is below {self.floor}"
...         return Anomaly(kind="too good", step=stats.step, value=stats.loss, signal="loss",
...                        threshold=self.floor, warn_only=True, message=message)
...     def update(self, stats: StepStats) -> None:
...         self.reported = self.reported or stats.loss < self.floor
...     def state_dict(self) -> dict[str, bool]:
...         return {"reported": self.reported}
...     def load_state_dict(self, state: dict[str, bool]) -> None:
...         self.reported = state["reported"]
>>> losses = [2.3, 1.9, 0.01, 0.01]
>>> detector = TooGood(floor=0.1)
>>> for step, loss in enumerate(losses):
...     stats = StepStats(step=step, loss=loss, grad_norm=1.0)
...     if (anomaly := detector.check(stats)) is None or anomaly.warn_only:
...         detector.update(stats)
...     if anomaly is not None:
...         print(step, anomaly.message)
2 loss 0.01 is below 0.1

``GradientMonitor(detectors=[*default_detectors(), TooGood(0.1)])`` runs it after the defaults.
"""

from lit_stability.detectors.anomaly import Anomaly, Detector, Kind, flagged, with_damage
from lit_stability.detectors.attention_logits import AttentionLogits
from lit_stability.detectors.curvature import Curvature
from lit_stability.detectors.dead_gradients import DeadGradients
from lit_stability.detectors.detector_set import DetectorSet, RegimeChange
from lit_stability.detectors.divergence import Divergence
from lit_stability.detectors.layer_bounds import LayerBounds
from lit_stability.detectors.loss_scale import LossScale
from lit_stability.detectors.lost_updates import LostUpdates
from lit_stability.detectors.nonfinite import NonFinite
from lit_stability.detectors.rank_agreement import Replicas, Vote, disagreement, rates_differ
from lit_stability.detectors.rolling_window import Window
from lit_stability.detectors.silent_corruption import SilentCorruption
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
    "RegimeChange",
    "Replicas",
    "SilentCorruption",
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
    """Returns new instances of the detectors that `GradientMonitor` uses by default.

    The order is from the most to the least certain. `LostUpdates` and those after it find trouble
    that loss and gradient norm do not show; they report it and, except for collapsed attention,
    nothing else is done.
    """
    return [
        SilentCorruption(),
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
