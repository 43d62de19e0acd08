"""Measures the magnitudes in a model, and judges which floating-point formats can represent them.

    batches --measure_ranges--> RangeReport --judge--> Verdict
                                RangeReport --format_report--> text    --draw_ranges--> figure

Names are imported on first use, so that a wrong command line is reported without loading torch.
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
