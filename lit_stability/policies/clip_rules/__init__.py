"""Rules that say to which norm the gradients of a step are clipped.

State machines over floats: data in, data out. Imports neither torch nor Lightning.

    FixedClip       always the same threshold
    TieredClip      a threshold for each range of norms; large norms lower the learning rate too
    PercentileClip  a percentile of the norms of late, within bounds
    MeanSigmaClip   the mean of the norms of late and some standard deviations
    ZScoreClip      the same with exponential averages, and the harder the larger the norm

What a rule learns from is decided by how it could be misled. A percentile is moved by how many
norms are large, and not by how large they are: it learns norms as they are measured, and has to, as
it could never rise again if it learned what it has clipped. A mean is moved by how large they are:
such a rule learns from a norm beyond its threshold as if it were at the threshold, so that a spike
of a million counts as three standard deviations, while norms that stay high raise the threshold
step by step until they pass.
"""

from lit_stability.policies.clip_rules.deviation import MeanSigmaClip, ZScoreClip
from lit_stability.policies.clip_rules.percentile import PercentileClip
from lit_stability.policies.clip_rules.rule import ClipRule, CutsLearningRate
from lit_stability.policies.clip_rules.tiers import FixedClip, TieredClip

__all__ = [
    "ClipRule",
    "CutsLearningRate",
    "FixedClip",
    "MeanSigmaClip",
    "PercentileClip",
    "TieredClip",
    "ZScoreClip",
]
