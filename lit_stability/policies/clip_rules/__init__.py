"""Clipping rules: the norm to which the gradients of a step are clipped.

Imports neither torch nor Lightning.

    FixedClip       always the same threshold
    TieredClip      a threshold for each range of norms; large norms also lower the learning rate
    PercentileClip  a percentile of recent norms, within bounds
    MeanSigmaClip   the mean of recent norms plus some standard deviations
    ZScoreClip      the same with exponential averages; the larger the norm, the harder the clip
    PerTensorClip   each tensor by itself, to a little more than the average of its clipped norms

The rules differ in the norm that they learn from a spike. A percentile depends on how many norms
are large, not on how large they are: it learns unclipped norms, since it could never rise again
from clipped ones. A mean depends on how large they are: it learns a norm above the threshold as the
threshold, so that a spike of a million counts as three standard deviations, while norms that stay
high raise the threshold step by step until they are no longer clipped.
"""

from lit_stability.policies.clip_rules.deviation import MeanSigmaClip, ZScoreClip
from lit_stability.policies.clip_rules.per_tensor import PerTensorClip
from lit_stability.policies.clip_rules.percentile import PercentileClip
from lit_stability.policies.clip_rules.rule import ClipRule, ClipsTensors, CutsLearningRate
from lit_stability.policies.clip_rules.tiers import FixedClip, TieredClip

__all__ = [
    "ClipRule",
    "ClipsTensors",
    "CutsLearningRate",
    "FixedClip",
    "MeanSigmaClip",
    "PerTensorClip",
    "PercentileClip",
    "TieredClip",
    "ZScoreClip",
]
