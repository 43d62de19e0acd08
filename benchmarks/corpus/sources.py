"""Turns the runs of other benchmarks into scenarios of the corpus.

Imports Lightning through `benchmarks.rescue`, `benchmarks.prediction` and `benchmarks.healthy`.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from benchmarks.byte_gpt import loader as bytes_of
from benchmarks.healthy.kind import Kind, start_and_end
from benchmarks.healthy.table import KINDS
from benchmarks.prediction.families import CALM, DIVERGING, make_run
from benchmarks.prediction.runs import Net, Run
from benchmarks.prediction.traces import loader_of, trainer_options
from benchmarks.rescue.scenario import HEALTHY, Scenario
from benchmarks.rescue.table import SCENARIOS
from benchmarks.rescue.tasks import HELD_OUT, Task, loss_on

DIVERGES = "diverging"
"""Family of the runs of `benchmarks.prediction` that diverge."""

TWIN = ", twin"
TWIN_RATES = {
    "SGD, rate too high": 0.1,
    "GPT, rate too high": 0.003,
    "GPT, post-norm, no warm-up": 0.01,
}
"""Factor on the learning rate of the twin, where the rate itself is the cause."""

CAUSES = {
    **{name: "learning rate jumped" for name in DIVERGING if ", rate x" in name},
    "least squares past the edge": "learning rate jumped",
    "targets that feed on the net": "loss or labels",
    "momentum above 1": "momentum too high",
    "GPT, post-norm, no warm-up": "no warm-up",
}
"""Why a family diverges; the learning rate is too high in all others."""


def scenario_of(source: str, name: str, seed: int) -> Scenario:
    """Returns a run of another benchmark as a scenario with a name that is unique in the corpus.

    Args:
        source: "rescue", "prediction" or "healthy".
        name: Name of a scenario, of a family of runs (with ", twin" for the twin of a diverging
            one), or of a kind.
        seed: Seed of the run; a family draws its hyperparameters from it.

    Raises:
        KeyError: There is no such run.
    """
    if source == "rescue":
        return SCENARIOS[name]
    if source == "healthy":
        task = _kind(KINDS[name])
        return Scenario(name=task.name, family=HEALTHY, task=task)
    family = name.removesuffix(TWIN)
    task = _family(family, seed, twin=name.endswith(TWIN))
    if name in CALM or name.endswith(TWIN):
        return Scenario(name=task.name, family=HEALTHY, task=task)
    return Scenario(
        name=task.name,
        family=DIVERGES,
        task=task,
        causes=(CAUSES.get(family, "learning rate too high"),),
        twin=_family(family, seed, twin=True),
    )


def _family(family: str, seed: int, *, twin: bool) -> Task:
    """Returns the run of a family; the twin has no ramp, jump or feedback, and a lower rate."""
    run = make_run(family, seed)

    def module() -> LightningModule:
        module = make_run(family, seed).module
        return _without_cause(module, TWIN_RATES.get(family, 1.0)) if twin else module

    return Task(
        name=f"{family}, seed {seed}{TWIN if twin else ''}",
        steps=run.steps,
        module=module,
        data=lambda seed: loader_of(make_run(family, seed)),
        held_out=lambda module, seed: loss_on(module, _held_out(run)),
        trainer=lambda: trainer_options(run),
    )


def _without_cause(module: Any, rate: float) -> LightningModule:
    module.schedule = lambda step: rate
    if isinstance(module, Net):
        module.feedback, module.momentum = (lambda step: 0.0), None
    return module


def _held_out(run: Run) -> Any:
    """Returns bytes of a fixed seed for a GPT; for a small net its last batches, as each is new."""
    if isinstance(run.data, DataLoader):
        return islice(bytes_of(32, 32, HELD_OUT), 10)
    return run.data[-20:]


def _kind(kind: Kind) -> Task:
    """Returns a kind of healthy practice; its loss is the median of its last tenth of values."""

    def final_value(module: Any, seed: int) -> float:
        if not module.values:  # the fit failed before its first step
            return math.nan
        end = start_and_end(module.values)[1]
        return end if kind.floor is None else max(end, kind.floor)

    return Task(
        name=f"{kind.name} (practice)",
        steps=kind.steps,
        module=kind.module,
        data=kind.data,
        held_out=final_value,
        trainer=kind.trainer,
        callbacks=kind.callbacks,
    )
