"""Finds the operation that made the first non-finite value which reached the loss or a gradient.

May import torch, but not Lightning.
"""

from lit_stability.diagnosis.nonfinite.origin import NonFiniteOrigin, TensorRange
from lit_stability.diagnosis.nonfinite.rerun import locate_nonfinite

__all__ = ["NonFiniteOrigin", "TensorRange", "locate_nonfinite"]
