"""Fits and evaluates the model of `CrashPrediction` on real divergences."""
