"""`LastKnownGood`: keeps good checkpoints, and verifies a resume from one of them."""

from lit_stability.callbacks.last_known_good.callback import LastKnownGood

__all__ = ["LastKnownGood"]
