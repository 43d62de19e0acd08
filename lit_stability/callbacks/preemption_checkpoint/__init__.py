"""`PreemptionCheckpoint`: saves a checkpoint when a scheduler asks the run to end."""

from lit_stability.callbacks.preemption_checkpoint.callback import PreemptionCheckpoint

__all__ = ["PreemptionCheckpoint"]
