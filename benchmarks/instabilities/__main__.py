"""Measures how the suite handles unstable runs and their healthy twins.

    python -m benchmarks.instabilities [--seeds 0 1 2] [--cases NAME ...] [--probes] [--quick]

Runs each case without the suite, with the suite, and its twin with the suite; a final loss is the
mean of the last 20 steps. ``--probes`` adds the opt-in probes to the suite. One thread.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

from benchmarks.instabilities.cases import CASES, Case
from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import (
    AttentionProbe,
    CurvatureProbe,
    GradientMonitor,
    Incident,
    TrainingStopped,
    stability_callbacks,
)
from lit_stability.incidents.report import responses_text


@dataclass(frozen=True)
class Result:
    """Result of a run."""

    loss: float
    """Mean loss of the last 20 steps."""
    steps: int
    incidents: list[Incident]

    def first(self) -> tuple[str, str, str]:
        """Returns step and kind, cause, and responses of the first incident with a response."""
        if not self.incidents:
            return "-", "-", "-"
        incident = next((i for i in self.incidents if i.responses), self.incidents[0])
        anomaly = f"{incident.first.step}: {incident.first.kind}"
        return anomaly, incident.cause or "-", responses_text(incident) or "reported"


def with_probes() -> list[Callback]:
    """Returns the default suite with the opt-in probes."""
    monitor, *others = stability_callbacks()
    return [monitor, AttentionProbe(every=20), CurvatureProbe(every=20), *others]


def train(case: Case, seed: int, callbacks: list[Callback]) -> Result:
    """Trains a case with a seed."""
    seed_everything(seed, verbose=False)
    module: Any = case.module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            max_steps=case.steps,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        with suppress(TrainingStopped):
            trainer.fit(module, case.data(seed))
    incidents = [i for c in callbacks if isinstance(c, GradientMonitor) for i in c.incidents]
    return Result(fmean(module.losses[-20:]), trainer.global_step, incidents)


def compare(case: Case, seed: int, suite: Callable[[], list[Callback]]) -> list[str]:
    """Runs a case, prints its results and returns them as a row."""
    with_suite = train(case, seed, suite())
    bare = train(case, seed, [])
    anomaly, cause, response = with_suite.first()
    print(f"{case.name} (seed {seed}): {anomaly} | {cause} | {response} | {with_suite.steps} steps")
    line = f"    loss bare {bare.loss:.4g}, suite {with_suite.loss:.4g}"
    if case.twin is not None:
        twin = train(case.healthy(), seed, suite())
        line += f", twin {twin.loss:.4g}; alarms of the twin {len(twin.incidents)}"
        line += "".join(f" ({i.first.kind} at {i.first.step})" for i in twin.incidents)
    else:
        line += f"; alarms {len(with_suite.incidents)}"
    print(line, flush=True)
    return [case.name, str(seed), anomaly, cause, response, str(with_suite.steps), line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--probes", action="store_true")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    suite = with_probes if args.probes else stability_callbacks
    rows = [compare(CASES[name], seed, suite) for name in args.cases for seed in seeds]
    columns = ["case", "seed", "anomaly", "cause", "response", "steps", "losses and alarms"]
    table = Table("instabilities", columns, rows)
    save("instabilities", folder_of(args), {"rows": rows}, [table])


if __name__ == "__main__":
    main()
