"""`GradientFlow`, and its picture: gradients layer by layer."""

from lit_stability.callbacks.gradient_flow.callback import GradientFlow

__all__ = ["GradientFlow"]
