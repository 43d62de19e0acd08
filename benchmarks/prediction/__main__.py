"""Evaluates the prediction of divergences on runs that the model was not fitted on.

    python -m benchmarks.prediction [--folder FOLDER] [--fit] [--leave-out] [--quick]

Uses about 700 short runs of 33 families, recorded once into the folder (15 minutes on one core) and
then read from it. Seeds 0 to 11 are for fitting, 12 to 21 for evaluation. ``--quick`` evaluates two
seeds of ten families with short runs. ``--fit`` prints the coefficients for
`lit_stability.policies.crash_risk.model`. ``--leave-out`` adds the calibration with models whose
fit excluded the family of the evaluated runs.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.prediction.families import FAMILIES
from benchmarks.prediction.fitting import fit, leave_family_out, samples_of
from benchmarks.prediction.report import (
    AlarmQuality,
    alarm_table,
    calibration,
    calibration_table,
    family_table,
    quality_of_alarms,
    quality_of_families,
)
from benchmarks.prediction.traces import Trace, load_or_record
from benchmarks.results import Table, add_options, folder_of, save
from lit_stability.policies.crash_risk import risk_of

FITTED, SEEDS = 12, 22
"""Seeds below the first are for fitting, the rest for evaluation."""
QUICK = (
    *("SGD, exponential ramp", "SGD, rate x30", "Adam, rate x30", "momentum above 1"),
    *("least squares past the edge", "SGD", "Adam", "warm restarts", "curriculum", "batches of 2"),
)
"""Families whose runs take one or two seconds."""


def main() -> None:
    """Records missing runs, fits on request, and writes the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: runs/prediction")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--leave-out", action="store_true")
    args = parser.parse_args()
    if args.quick and (args.fit or args.leave_out):
        parser.error("--quick has no runs to fit on: omit --fit and --leave-out")
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names, seeds = (QUICK, range(FITTED, FITTED + 2)) if args.quick else (FAMILIES, range(SEEDS))
    folder = args.folder or Path("runs/prediction")
    runs = [load_or_record(f, s, folder) for f in names for s in seeds]
    fitting = [run for run in runs if run.seed < FITTED]
    evaluation = [run for run in runs if run.seed >= FITTED]
    if args.fit:
        samples = samples_of(fitting)
        print(f"{len(samples.labels)} samples, {samples.labels.mean():.3f} positive")
        print(fit(samples))
    figures, tables = report(evaluation)
    if args.leave_out:
        bins = calibration(leave_family_out(samples_of(fitting), samples_of(evaluation)))
        figures["calibration, families left out in turn"] = bins
        tables.append(calibration_table("calibration, family excluded from the fit", bins))
    save("prediction", folder_of(args), figures, tables)


def report(traces: list[Trace]) -> tuple[dict[str, Any], list[Table]]:
    """Evaluates the alarms on runs; returns figures and tables."""
    alarms, by_family = quality_of_alarms(traces), quality_of_families(traces)
    samples = samples_of(traces)
    risks = [risk_of(row) for row in samples.features.tolist()]
    bins = calibration(list(zip(risks, samples.labels.tolist(), strict=True)))
    figures = {
        "runs": len(traces),
        "diverged": sum(run.onset() is not None for run in traces),
        "alarms": {name: _figures(quality) for name, quality in alarms.items()},
        "families": {name: {"leads": q.leads, "false": q.false} for name, q in by_family.items()},
        "calibration": bins,
    }
    tables = [alarm_table(alarms), family_table(by_family), calibration_table("calibration", bins)]
    return figures, tables


def _figures(quality: dict[str, AlarmQuality]) -> dict[str, Any]:
    """Returns recall, lead times and false alarms of one alarm."""
    all_runs, calm = quality["all"], quality["calm"]
    return {
        "recall": all_runs.recall(),
        "recall_10_steps_ahead": all_runs.recall(10),
        "leads": all_runs.leads,
        "false_per_1000_steps": 1000 * all_runs.false / max(1, all_runs.steps),
        "false_per_1000_calm_steps": 1000 * calm.false / max(1, calm.steps),
    }


if __name__ == "__main__":
    main()
