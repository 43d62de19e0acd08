"""Measures whether the cause that is named is the true one.

    python -m benchmarks.causes [--groups field instabilities rescue] [--only TEXT ...] [--quick]

Runs the faults of `benchmarks.rescue`, the unstable runs of `benchmarks.instabilities` and the
mistakes of `benchmarks.field_causes`, each with the default suite and one seed, and compares the
cause of the first incident that had a response with the true ones. *Unknown* is no error: a wrong
cause is. ``--only`` chooses cases by a part of their name. One thread.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything

from benchmarks.field_causes import FIELD, FieldCase, Fitted
from benchmarks.instabilities.cases import CASES, Case
from benchmarks.rescue.injected import INJECTED
from benchmarks.rescue.recurring import RECURRING
from benchmarks.rescue.run import run as rescue
from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor, Incident, TrainingStopped, stability_callbacks
from lit_stability.faults import FaultInjector

Verdict = Literal["right", "unknown", "wrong", "silent"]
GROUPS = ("field", "instabilities", "rescue")


@dataclass(frozen=True)
class Row:
    """A case with the cause that was named for it."""

    group: str
    case: str
    true: tuple[str, ...]
    named: str
    """"" if the cause is unknown."""
    alarms: int
    """Number of incidents."""

    @property
    def verdict(self) -> Verdict:
        """``silent`` if there was no incident."""
        if not self.alarms:
            return "silent"
        if not self.named:
            return "unknown" if self.true else "right"
        return "right" if self.named in self.true else "wrong"

    def cells(self) -> list[str]:
        """Returns the row as text."""
        return [
            self.group,
            self.case,
            " / ".join(self.true) or "-",
            self.named or "-",
            self.verdict,
        ]


def train(module: LightningModule, data: Any, steps: int, before: list[Callback]) -> list[Incident]:
    """Trains with the default suite and returns the incidents."""
    suite = stability_callbacks()
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            max_steps=steps, default_root_dir=folder, callbacks=[*before, *suite]
        )
        # A batch that makes the step raise ends the run: its incidents count all the same.
        with suppress(TrainingStopped, RuntimeError, ValueError):
            trainer.fit(module, data)
    return [i for c in suite if isinstance(c, GradientMonitor) for i in c.incidents]


def named(incidents: list[Incident]) -> str:
    """Returns the cause of the first incident with a response; of the first one if none has."""
    answered = [i for i in incidents if i.responses]
    return next((i.cause for i in answered or incidents), "")


def of_field(case: FieldCase) -> Row:
    """Runs a mistake."""
    seed_everything(0, verbose=False)
    module = Fitted(case.net(), case.loss, case.optimizer, **case.options)
    faults: list[Callback] = [FaultInjector(case.faults())] if case.faults() else []
    incidents = train(module, case.data(), case.steps, faults)
    return Row("field", case.name, case.causes, named(incidents), len(incidents))


def of_instability(case: Case) -> Row:
    """Runs an unstable run."""
    assert case.cause is not None
    seed_everything(0, verbose=False)
    incidents = train(case.module(), case.data(0), case.steps, [])
    return Row("instabilities", case.name, (case.cause,), named(incidents), len(incidents))


def of_rescue(name: str, causes: tuple[str, ...]) -> Row:
    """Runs a fault of the rescue benchmark."""
    from benchmarks.rescue.table import by_name

    outcome = rescue(by_name(name), "this suite", 0)
    return Row("rescue", name, causes, outcome.cause, len(outcome.incidents))


def jobs(groups: list[str]) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yields the name of each case and the function that runs it."""
    if "field" in groups:
        yield from ((case.name, lambda case=case: of_field(case)) for case in FIELD)
    if "instabilities" in groups:
        unstable = [case for case in CASES.values() if case.cause is not None]
        yield from ((case.name, lambda case=case: of_instability(case)) for case in unstable)
    if "rescue" in groups:
        for each in (*INJECTED, *RECURRING):
            yield each.name, lambda each=each: of_rescue(each.name, each.causes)


def summary(rows: list[Row]) -> list[list[str]]:
    """Counts the verdicts of each group and of all."""
    counted = []
    for group in (*dict.fromkeys(row.group for row in rows), "all"):
        chosen = [row.verdict for row in rows if group in ("all", row.group)]
        numbers = [chosen.count(each) for each in ("right", "unknown", "wrong", "silent")]
        counted.append([group, str(len(chosen)), *map(str, numbers)])
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    for name in ("lightning.pytorch.lit_stability", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for name, run in jobs(["field"] if args.quick else args.groups):
        if any(part in name for part in args.only):
            rows.append(run())
            print(" | ".join(rows[-1].cells()), flush=True)
    tables = [
        Table("verdicts", ["group", "cases", "right", "unknown", "wrong", "silent"], summary(rows)),
        Table("causes", ["group", "case", "true", "named", "verdict"], [r.cells() for r in rows]),
    ]
    print(tables[0].markdown())
    save("causes", folder_of(args), {"rows": [row.cells() for row in rows]}, tables)


if __name__ == "__main__":
    main()
