"""`CrashPrediction`, and what it does before a divergence."""

from lit_stability.callbacks.crash_prediction.callback import CrashPrediction

__all__ = ["CrashPrediction"]
