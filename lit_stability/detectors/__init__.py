"""Detectors: small state machines over floats that say when a step is not like the others.

``check(stats)`` looks; ``update(stats)`` learns, and is called for accepted steps only, so that a
flagged or non-finite value never enters a window. One instance serves one optimizer.
No file of this folder imports torch or Lightning.
"""

from lit_stability.detectors.agreement import Replicas, Vote, disagreement, rates_differ
from lit_stability.detectors.anomaly import Anomaly, Detector, Kind, flagged, with_damage
from lit_stability.detectors.attention import AttentionLogits
from lit_stability.detectors.bounds import LayerBounds
from lit_stability.detectors.corruption import WeightCorruption
from lit_stability.detectors.curvature import Curvature
from lit_stability.detectors.dead import DeadGradients
from lit_stability.detectors.divergence import Divergence
from lit_stability.detectors.drift import WeightDrift
from lit_stability.detectors.learning import NoLearning
from lit_stability.detectors.lost import LostUpdates
from lit_stability.detectors.nonfinite import NonFinite
from lit_stability.detectors.oscillation import Oscillation
from lit_stability.detectors.panel import Panel
from lit_stability.detectors.scale import LossScale
from lit_stability.detectors.spike import Spike
from lit_stability.detectors.staleness import StaleMoments
from lit_stability.detectors.stall import Stall
from lit_stability.detectors.update import LearningRateJump, OptimizerState, UpdateSpike
from lit_stability.detectors.vanishing import Vanishing
from lit_stability.detectors.window import Window

__all__ = [
    "Anomaly",
    "AttentionLogits",
    "Curvature",
    "DeadGradients",
    "Detector",
    "Divergence",
    "Kind",
    "LayerBounds",
    "LearningRateJump",
    "LossScale",
    "LostUpdates",
    "NoLearning",
    "NonFinite",
    "OptimizerState",
    "Oscillation",
    "Panel",
    "Replicas",
    "Spike",
    "StaleMoments",
    "Stall",
    "UpdateSpike",
    "Vanishing",
    "Vote",
    "WeightCorruption",
    "WeightDrift",
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
