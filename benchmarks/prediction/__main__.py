"""How well a divergence is foreseen: tables on runs that the model was not fitted on.

    python -m benchmarks.prediction [--folder FOLDER] [--fit] [--leave-out] [--quick]

Some 700 short runs of 33 families, recorded once into the folder (a quarter of an hour on one core)
and read from there afterwards. Seeds 0 to 11 are for fitting, 12 to 21 for the tables. ``--quick``
takes two seeds of ten families, whose runs are short, for the tables alone. ``--fit`` prints the
numbers that stand in `lit_stability.policies.crash_risk.model`; ``--leave-out`` the calibration
where the families of the tested moments were left out of the fit as well.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.prediction.families import FAMILIES
from benchmarks.prediction.fitting import fit, left_out, moments_of
from benchmarks.prediction.report import (
    Worth,
    alarm_table,
    calibration,
    calibration_table,
    family_table,
    worth_of_alarms,
    worth_of_families,
)
from benchmarks.prediction.traces import Trace, load_or_record
from benchmarks.results import Table, add_options, folder_of, save
from lit_stability.policies.crash_risk import risk_of

FITTED, SEEDS = 12, 22
"""Seeds below the first are for fitting, the rest for the tables."""
QUICK = (
    *("SGD, exponential ramp", "SGD, rate x30", "Adam, rate x30", "momentum above 1"),
    *("least squares past the edge", "SGD", "Adam", "warm restarts", "curriculum", "batches of 2"),
)
"""Families whose runs take a second or two."""


def main() -> None:
    """Record what is missing, fit if asked to, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--folder", type=Path, help="where the runs are kept; runs/prediction")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--leave-out", action="store_true")
    args = parser.parse_args()
    if args.quick and (args.fit or args.leave_out):
        parser.error("--quick has no runs to fit on: leave out --fit and --leave-out")
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names, seeds = (QUICK, range(FITTED, FITTED + 2)) if args.quick else (FAMILIES, range(SEEDS))
    folder = args.folder or Path("runs/prediction")
    runs = [load_or_record(f, s, folder) for f in names for s in seeds]
    fitted = [run for run in runs if run.seed < FITTED]
    tested = [run for run in runs if run.seed >= FITTED]
    if args.fit:
        moments = moments_of(fitted)
        print(f"{len(moments.followed)} moments, {moments.followed.mean():.3f} followed")
        print(fit(moments))
    figures, tables = report(tested)
    if args.leave_out:
        bins = calibration(left_out(moments_of(fitted), moments_of(tested)))
        figures["calibration, families left out in turn"] = bins
        tables.append(calibration_table("families left out of the fit in turn", bins))
    save("prediction", folder_of(args), figures, tables)


def report(tested: list[Trace]) -> tuple[dict[str, Any], list[Table]]:
    """What the alarms are worth on runs, as figures and as tables."""
    alarms, by_family = worth_of_alarms(tested), worth_of_families(tested)
    moments = moments_of(tested)
    risks = [risk_of(row) for row in moments.features.tolist()]
    bins = calibration(list(zip(risks, moments.followed.tolist(), strict=True)))
    figures = {
        "runs": len(tested),
        "diverged": sum(run.onset() is not None for run in tested),
        "alarms": {name: _figures(w) for name, w in alarms.items()},
        "families": {name: {"leads": w.leads, "false": w.false} for name, w in by_family.items()},
        "calibration": bins,
    }
    shown = [alarm_table(alarms), family_table(by_family), calibration_table("calibration", bins)]
    return figures, shown


def _figures(worth: dict[str, Worth]) -> dict[str, Any]:
    """Recall, lead and false alarms of one alarm."""
    every, calm = worth["all"], worth["calm"]
    return {
        "recall": every.recall(),
        "recall_10_steps_ahead": every.recall(10),
        "leads": every.leads,
        "false_per_1000_steps": 1000 * every.false / max(1, every.steps),
        "false_per_1000_calm_steps": 1000 * calm.false / max(1, calm.steps),
    }


if __name__ == "__main__":
    main()
