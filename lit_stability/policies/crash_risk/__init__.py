"""The risk that a run diverges within 20 steps, and the preventive responses to it.

Imports neither torch nor Lightning.
"""

from lit_stability.policies.crash_risk.model import HORIZON, CrashRisk, risk_of
from lit_stability.policies.crash_risk.prevention import Decision, Prevention, RiskLevels

__all__ = ["HORIZON", "CrashRisk", "Decision", "Prevention", "RiskLevels", "risk_of"]
