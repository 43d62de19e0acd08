"""Callbacks that detect, diagnose and repair instabilities in PyTorch Lightning training.

Importing this package loads neither torch nor lightning. Public names are imported on first use
(PEP 562), because TensorBoard imports the package when it starts.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AdaptiveGradientClipping": "callbacks",
    "Anomaly": "detectors",
    "AnomalyCheckpoint": "callbacks",
    "AttentionProbe": "callbacks",
    "AutoRollback": "callbacks",
    "CrashPrediction": "callbacks",
    "CurvatureProbe": "callbacks",
    "Diagnosis": "callbacks",
    "GradientFlow": "callbacks",
    "GradientMonitor": "callbacks",
    "Incident": "incidents",
    "LastKnownGood": "callbacks",
    "NonFiniteLocator": "callbacks",
    "NonFiniteOrigin": "diagnosis.nonfinite",
    "PrecisionFallback": "callbacks",
    "Preflight": "callbacks",
    "StabilityCallback": "callbacks",
    "StepStats": "measurement.step_stats",
    "TrainingStopped": "incidents",
    "estimate_memory": "training_state.memory_estimate",
    "find_last_good": "training_state.good_checkpoints",
    "fit_with_recovery": "restart",
    "locate_nonfinite": "diagnosis.nonfinite",
    "measure_attention": "measurement.attention_monitor",
    "read_incidents": "incidents.log",
    "stability_callbacks": "callbacks",
}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_stability' has no attribute {name!r}")
    return getattr(import_module(f"lit_stability.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
