"""The risk that a run diverges within 20 steps, and what it asks for.

Imports neither torch nor Lightning.
"""

from lit_stability.risk.model import HORIZON, CrashRisk, risk_of
from lit_stability.risk.prevention import Decision, Prevention, RiskLevels

__all__ = ["HORIZON", "CrashRisk", "Decision", "Prevention", "RiskLevels", "risk_of"]
