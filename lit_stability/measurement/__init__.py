"""Measures the tensors of an optimizer step; the result, `StepStats`, holds floats only.

May import torch but not Lightning. This file imports neither, so that `step_stats` stays light.
"""
