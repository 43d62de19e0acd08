"""`CrashPrediction`, and the preventive actions that it takes before a divergence."""

from lit_stability.callbacks.crash_prediction.callback import CrashPrediction

__all__ = ["CrashPrediction"]
