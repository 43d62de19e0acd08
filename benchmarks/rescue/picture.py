"""Draws the outcomes as a grid: scenarios as rows, protections as columns. Imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

from benchmarks.rescue.judge import Verdict
from benchmarks.rescue.scenario import HEALTHY

# Colours by Okabe and Ito, which also differ in lightness; each state also has its own mark.
STATES = {
    "saved": ("#56B4E9", ""),
    "saved, as unprotected": ("#D8ECF8", ""),
    "named, beyond remedy": ("#009E73", "N"),
    "finished, worse": ("#E69F00", "×"),
    "stopped": ("#999999", "■"),
    "NaN or failed": ("#3B1F2B", "!"),
}


def state(verdict: Verdict, bare_saved: bool) -> str:
    """Returns the state of a run, a key of `STATES`."""
    if verdict.saved and verdict.beyond_remedy:
        return "named, beyond remedy"
    if verdict.saved:
        return "saved, as unprotected" if bare_saved else "saved"
    if verdict.outcome.ended == "finished":
        return "finished, worse"
    return "stopped" if verdict.outcome.ended == "stopped" else "NaN or failed"


def draw(verdicts: Sequence[Verdict], path: Path) -> None:
    """Writes the picture of the runs with the first seed."""
    seed = min(v.outcome.seed for v in verdicts)
    shown = [v for v in verdicts if v.family != HEALTHY and v.outcome.seed == seed]
    scenarios = list(dict.fromkeys((v.family, v.outcome.scenario) for v in shown))
    protections = list(dict.fromkeys(v.outcome.protection for v in shown))
    bare = {v.outcome.scenario: v.saved for v in shown if v.outcome.protection == protections[0]}
    figure, axes = plt.subplots(
        figsize=(3.4 + 0.95 * len(protections), 1.8 + 0.21 * len(scenarios))
    )
    for verdict in shown:
        row = scenarios.index((verdict.family, verdict.outcome.scenario))
        column = protections.index(verdict.outcome.protection)
        _tile(axes, row, column, state(verdict, bare.get(verdict.outcome.scenario, False)))
    _label(axes, scenarios, protections)
    _legend(axes)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _tile(axes: Any, row: int, column: int, name: str) -> None:
    colour, mark = STATES[name]
    axes.add_patch(Rectangle((column, row), 0.94, 0.9, color=colour, linewidth=0))
    ink = "white" if name == "NaN or failed" else "black"
    axes.text(column + 0.47, row + 0.47, mark, ha="center", va="center", color=ink, fontsize=8)


def _label(axes: Any, scenarios: list[tuple[str, str]], protections: list[str]) -> None:
    axes.set_xlim(0, len(protections))
    axes.set_ylim(len(scenarios), 0)
    axes.set_xticks([i + 0.47 for i in range(len(protections))], protections, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(
        [i + 0.45 for i in range(len(scenarios))], [s for _, s in scenarios], fontsize=7
    )
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    families = [family for family, _ in scenarios]
    for i, family in enumerate(families):
        if i == 0 or families[i - 1] != family:
            axes.axhline(i - 0.05, color="#777777", linewidth=0.6)
            axes.text(len(protections) + 0.1, i + 0.5, family, fontsize=8, va="center")


def _legend(axes: Any) -> None:
    patches = [
        Patch(color=colour, label=f"{mark} {name}".strip())
        for name, (colour, mark) in STATES.items()
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
    axes.legend(handles=patches, ncol=3, frameon=False, fontsize=8, **place)
