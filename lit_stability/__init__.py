"""Callbacks that detect, diagnose and repair instabilities in PyTorch Lightning training.

Importing this package loads neither torch nor lightning. Public names are imported on first use
(PEP 562), because TensorBoard imports the package when it starts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from lit_stability.callbacks import AdaptiveGradientClipping as AdaptiveGradientClipping
    from lit_stability.callbacks import Alerts as Alerts
    from lit_stability.callbacks import AnomalyCheckpoint as AnomalyCheckpoint
    from lit_stability.callbacks import AttentionProbe as AttentionProbe
    from lit_stability.callbacks import AutoRollback as AutoRollback
    from lit_stability.callbacks import CrashPrediction as CrashPrediction
    from lit_stability.callbacks import CurvatureProbe as CurvatureProbe
    from lit_stability.callbacks import Diagnosis as Diagnosis
    from lit_stability.callbacks import GradientFlow as GradientFlow
    from lit_stability.callbacks import GradientMonitor as GradientMonitor
    from lit_stability.callbacks import IntegrityAudit as IntegrityAudit
    from lit_stability.callbacks import LastKnownGood as LastKnownGood
    from lit_stability.callbacks import NonFiniteLocator as NonFiniteLocator
    from lit_stability.callbacks import PrecisionFallback as PrecisionFallback
    from lit_stability.callbacks import PreemptionCheckpoint as PreemptionCheckpoint
    from lit_stability.callbacks import Preflight as Preflight
    from lit_stability.callbacks import QKClip as QKClip
    from lit_stability.callbacks import RankWatchdog as RankWatchdog
    from lit_stability.callbacks import StabilityCallback as StabilityCallback
    from lit_stability.callbacks import stability_callbacks as stability_callbacks
    from lit_stability.detectors import Anomaly as Anomaly
    from lit_stability.diagnosis.nonfinite import NonFiniteOrigin as NonFiniteOrigin
    from lit_stability.diagnosis.nonfinite import locate_nonfinite as locate_nonfinite
    from lit_stability.incidents import Incident as Incident
    from lit_stability.incidents import TrainingStopped as TrainingStopped
    from lit_stability.incidents.log import read_incidents as read_incidents
    from lit_stability.measurement.attention_monitor import measure_attention as measure_attention
    from lit_stability.measurement.step_stats import StepStats as StepStats
    from lit_stability.policies.escalation import Budget as Budget
    from lit_stability.restart import fit_with_recovery as fit_with_recovery
    from lit_stability.trainer_internals import register_strategy as register_strategy
    from lit_stability.training_state.good_checkpoints import find_last_good as find_last_good
    from lit_stability.training_state.memory_estimate import estimate_memory as estimate_memory
    from lit_stability.training_state.preemption_checkpoints import (
        find_resume_checkpoint as find_resume_checkpoint,
    )

_HOME = {
    "AdaptiveGradientClipping": "callbacks",
    "Alerts": "callbacks",
    "Anomaly": "detectors",
    "AnomalyCheckpoint": "callbacks",
    "AttentionProbe": "callbacks",
    "AutoRollback": "callbacks",
    "Budget": "policies.escalation",
    "CrashPrediction": "callbacks",
    "CurvatureProbe": "callbacks",
    "Diagnosis": "callbacks",
    "GradientFlow": "callbacks",
    "GradientMonitor": "callbacks",
    "Incident": "incidents",
    "IntegrityAudit": "callbacks",
    "LastKnownGood": "callbacks",
    "NonFiniteLocator": "callbacks",
    "NonFiniteOrigin": "diagnosis.nonfinite",
    "PrecisionFallback": "callbacks",
    "PreemptionCheckpoint": "callbacks",
    "Preflight": "callbacks",
    "QKClip": "callbacks",
    "RankWatchdog": "callbacks",
    "StabilityCallback": "callbacks",
    "StepStats": "measurement.step_stats",
    "TrainingStopped": "incidents",
    "estimate_memory": "training_state.memory_estimate",
    "find_last_good": "training_state.good_checkpoints",
    "find_resume_checkpoint": "training_state.preemption_checkpoints",
    "fit_with_recovery": "restart",
    "locate_nonfinite": "diagnosis.nonfinite",
    "measure_attention": "measurement.attention_monitor",
    "read_incidents": "incidents.log",
    "register_strategy": "trainer_internals",
    "stability_callbacks": "callbacks",
}

__version__ = "0.2.0"
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_stability' has no attribute {name!r}")
    return getattr(import_module(f"lit_stability.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
