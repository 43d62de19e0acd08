"""What a model spans, and which floating-point formats would hold it.

    batches --measure_ranges--> RangeReport --judge--> Verdict
                                    |-- format_report: a table    |-- draw_ranges: a picture

Names arrive on first use: the command that measures a checkpoint answers before torch is loaded.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "LossScale": "limits",
    "RangeReport": "report",
    "RangeRow": "report",
    "Verdict": "verdict",
    "draw_ranges": "plot",
    "format_report": "table",
    "judge": "verdict",
    "measure_ranges": "measure",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'lit_stability.checks.precision_ranges' has no attribute {name!r}"
        )
    return getattr(import_module(f"lit_stability.checks.precision_ranges.{_HOME[name]}"), name)
