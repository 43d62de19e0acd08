"""`Alerts`: sends a message when an incident opens, when the fit stops and when it ends."""

from lit_stability.callbacks.alerts.callback import Alerts

__all__ = ["Alerts"]
