"""`IntegrityAudit`, its checks of steps, updates and memory, and its ledger."""

from lit_stability.callbacks.integrity_audit.callback import IntegrityAudit

__all__ = ["IntegrityAudit"]
