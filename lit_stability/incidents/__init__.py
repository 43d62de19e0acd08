"""Incidents: their state, the record on disk, reports, and the step attempts around them.

Imports neither torch nor Lightning.
"""

from lit_stability.incidents.incident import Incident, Outcome, TrainingStopped

__all__ = ["Incident", "Outcome", "TrainingStopped"]
