"""What a checkpoint says of the health of its run, and what lies between two of them.

    checkpoint --examine--> HealthReport (tensors, moments, run) --find_problems--> findings
    two of them --compare--> Comparison
    either --format_report, format_comparison--> tables, --draw_health, draw_comparison--> a picture

Names arrive on first use: a misspelt command line is answered before torch is loaded.
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
