"""`AutoRollback`, and its parts: carrying a response out, and going back to a snapshot."""

from lit_stability.callbacks.auto_rollback.callback import AutoRollback

__all__ = ["AutoRollback"]
