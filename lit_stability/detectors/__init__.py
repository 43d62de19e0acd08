"""Detectors: small state machines over floats that say when a step is not like the others.

``check(stats)`` looks; ``update(stats)`` learns, and is called for accepted steps only, so that a
flagged or non-finite value never enters a window. One instance serves one optimizer.
No file of this folder imports torch or Lightning.
"""

from lit_stability.detectors.agreement import Replicas, Vote, disagreement, rates_differ
from lit_stability.detectors.anomaly import Anomaly, Detector, Kind, flagged, with_damage
from lit_stability.detectors.attention import AttentionLogits
from lit_stability.detectors.bounds import LayerBounds
from lit_stability.detectors.curvature import Curvature
from lit_stability.detectors.divergence import Divergence
from lit_stability.detectors.lost import LostUpdates
from lit_stability.detectors.nonfinite import NonFinite
from lit_stability.detectors.panel import Panel
from lit_stability.detectors.scale import LossScale
from lit_stability.detectors.spike import Spike
from lit_stability.detectors.staleness import StaleMoments
from lit_stability.detectors.update import LearningRateJump, OptimizerState, UpdateSpike
from lit_stability.detectors.window import Window

__all__ = [
    "Anomaly",
    "AttentionLogits",
    "Curvature",
    "Detector",
    "Divergence",
    "Kind",
    "LayerBounds",
    "LearningRateJump",
    "LossScale",
    "LostUpdates",
    "NonFinite",
    "OptimizerState",
    "Panel",
    "Replicas",
    "Spike",
    "StaleMoments",
    "UpdateSpike",
    "Vote",
    "Window",
    "default_detectors",
    "disagreement",
    "flagged",
    "rates_differ",
    "with_damage",
]


def default_detectors() -> list[Detector]:
    """The detectors of a `GradientMonitor` that was given none, most certain first."""
    return [
        NonFinite(),
        LossScale(),
        OptimizerState(),
        UpdateSpike(),
        LearningRateJump(),
        Spike("grad_norm"),
        Divergence(),
        LostUpdates(),
        AttentionLogits(),
        Curvature(),
        StaleMoments(),
    ]
