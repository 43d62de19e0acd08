"""An incident: what happened, what was done, how it ended; its record, report and surroundings.

Imports neither torch nor Lightning.
"""

from lit_stability.incidents.incident import Incident, Outcome, TrainingStopped

__all__ = ["Incident", "Outcome", "TrainingStopped"]
