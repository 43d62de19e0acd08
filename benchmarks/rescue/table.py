"""All scenarios by name, and the few of a quick run. May import what they are made of."""

from __future__ import annotations

from benchmarks.rescue.from_outside import FROM_OUTSIDE
from benchmarks.rescue.from_within import FROM_WITHIN
from benchmarks.rescue.healthy import HEALTHY_RUNS
from benchmarks.rescue.scenario import Scenario

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for scenario in (*HEALTHY_RUNS, *FROM_OUTSIDE, *FROM_WITHIN)
}
"""By name, the healthy ones first."""

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
"""Of every family one, on the models that are quickest."""


def chosen(names: list[str]) -> list[Scenario]:
    """Scenarios by name, each with its twin before it.

    Raises:
        ValueError: if there is none of a name.
    """
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise ValueError(f"there is no scenario {unknown[0]!r}; choose from {list(SCENARIOS)}")
    wanted = [SCENARIOS[name] for name in names]
    twins = [scenario.undisturbed() for scenario in wanted]
    return list({s.name: s for s in (*twins, *wanted)}.values())


def by_name(name: str) -> Scenario:
    """A scenario, or the twin of one.

    Raises:
        ValueError: if there is none of that name.
    """
    return next(s for s in chosen(list(SCENARIOS)) if s.name == name)
