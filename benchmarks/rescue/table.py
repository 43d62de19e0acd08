"""All scenarios by name, and the selection of a quick run."""

from __future__ import annotations

from benchmarks.rescue.healthy import HEALTHY_RUNS
from benchmarks.rescue.injected import INJECTED
from benchmarks.rescue.recurring import RECURRING
from benchmarks.rescue.scenario import Scenario

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for scenario in (*HEALTHY_RUNS, *INJECTED, *RECURRING)
}
"""Scenarios by name, the healthy ones first."""

QUICK: tuple[str, ...] = (
    "CNN",
    "GRU",
    "CNN, batches of 2",
    "NaN loss, CNN, step 355",
    "loss x 1e4, CNN, step 30",
    "gradients of one layer x 1e4, GRU, step 180",
    "learning rate x 300, CNN, step 180",
    "exponent bit flipped, GRU, step 340",
    "second moment zeroed, CNN, step 180",
    "NaN in the images, CNN, batch 180",
    "images x 1e3 from there on, CNN, batch 60",
    "learning rate diverges",
    "final gain zeroed",
)
"""At least one scenario of every family, on the fastest models."""


def with_twins(names: list[str]) -> list[Scenario]:
    """Returns the scenarios with these names, after their twins.

    Raises:
        ValueError: There is no scenario with such a name.
    """
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise ValueError(f"there is no scenario {unknown[0]!r}; choose from {list(SCENARIOS)}")
    scenarios = [SCENARIOS[name] for name in names]
    twins = [scenario.undisturbed() for scenario in scenarios]
    return list({s.name: s for s in (*twins, *scenarios)}.values())


def by_name(name: str) -> Scenario:
    """Returns a scenario or a twin.

    Raises:
        StopIteration: There is none with this name.
    """
    return next(s for s in with_twins(list(SCENARIOS)) if s.name == name)
