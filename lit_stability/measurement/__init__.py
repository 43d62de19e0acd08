"""Tensors of one optimizer step -> `StepStats`, the floats that everything else looks at.

May import torch; knows no Lightning. This file imports neither, so that `step_stats` stays light.
"""
