"""Examines a checkpoint for damage, and compares two checkpoints.

    checkpoint      --examine--> HealthReport: tensors, moments, run, findings
    two checkpoints --compare--> Comparison
    HealthReport    --format_report--> text        --draw_health--> figure
    Comparison      --format_comparison--> text    --draw_comparison--> figure

Names are imported on first use, so that a wrong command line is reported without loading torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Comparison": "comparison",
    "Finding": "report",
    "HealthReport": "report",
    "compare": "difference",
    "draw_comparison": "plot",
    "draw_health": "plot",
    "examine": "examination",
    "format_comparison": "comparison",
    "format_report": "table",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_stability.checks.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"lit_stability.checks.checkpoint.{_HOME[name]}"), name)
