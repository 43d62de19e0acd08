"""`LastKnownGood`, and its parts: keeping good checkpoints, and verifying a resume from one."""

from lit_stability.callbacks.last_known_good.callback import LastKnownGood

__all__ = ["LastKnownGood"]
