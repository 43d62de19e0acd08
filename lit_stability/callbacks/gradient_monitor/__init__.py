"""`GradientMonitor`, and its parts: measuring a step, tracking incidents, reporting them."""

from lit_stability.callbacks.gradient_monitor.callback import GradientMonitor

__all__ = ["GradientMonitor"]
