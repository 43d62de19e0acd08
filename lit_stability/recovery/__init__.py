"""Recovery from exceptions: a fit that crashes is begun again from its last good checkpoint.

May import Lightning.
"""

from lit_stability.recovery.fit import Recover, RecoveryResult, fit_with_recovery

__all__ = ["Recover", "RecoveryResult", "fit_with_recovery"]
