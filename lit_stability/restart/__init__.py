"""Recovery from exceptions: a fit that crashes is restarted from its last good checkpoint.

May import Lightning.
"""

from lit_stability.restart.fit import fit_with_recovery
from lit_stability.restart.loop import Recover, RecoveryResult

__all__ = ["Recover", "RecoveryResult", "fit_with_recovery"]
