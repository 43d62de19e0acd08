"""`GradientFlow`, and its picture: the gradients of every layer."""

from lit_stability.callbacks.gradient_flow.callback import GradientFlow

__all__ = ["GradientFlow"]
