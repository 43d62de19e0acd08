"""The catalogue of causes, with their evidence rules, what to try, and when to ignore them.

No file of this folder imports torch or Lightning.
"""

from lit_stability.diagnosis.catalogue.data import DATA, MACHINE, NUMERICS
from lit_stability.diagnosis.catalogue.model import MODEL
from lit_stability.diagnosis.catalogue.optimization import LEARNING_RATE, OPTIMIZER
from lit_stability.diagnosis.cause import register_cause

__all__ = ["DATA", "LEARNING_RATE", "MACHINE", "MODEL", "NUMERICS", "OPTIMIZER"]


def register_catalogue() -> None:
    """Registers all causes of the catalogue."""
    for row in (*DATA, *NUMERICS, *LEARNING_RATE, *OPTIMIZER, *MODEL, *MACHINE):
        register_cause(row)
