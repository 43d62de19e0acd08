"""How well a divergence is foreseen: tables on runs that the model was not fitted on.

    python -m benchmarks.prediction --folder FOLDER [--fit] [--leave-out]

Some 700 short runs of 33 families, recorded once into the folder (a quarter of an hour on one core)
and read from there afterwards. Seeds 0 to 11 are for fitting, 12 to 21 for the tables. ``--fit``
prints the numbers that stand in `lit_stability.risk.model`; ``--leave-out`` the calibration where
the families of the tested moments were left out of the fit as well.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch

from benchmarks.prediction.families import FAMILIES
from benchmarks.prediction.fitting import fit, left_out, moments_of
from benchmarks.prediction.report import print_calibration, print_families, print_worth
from benchmarks.prediction.traces import Trace, load_or_record
from lit_stability.risk import risk_of

FITTED, SEEDS = 12, 22
"""Seeds below the first are for fitting, the rest for the tables."""


def main() -> None:
    """Record what is missing, fit if asked to, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--leave-out", action="store_true")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = [load_or_record(f, s, args.folder) for f in FAMILIES for s in range(SEEDS)]
    fitted = [run for run in runs if run.seed < FITTED]
    tested = [run for run in runs if run.seed >= FITTED]
    if args.fit:
        moments = moments_of(fitted)
        print(f"{len(moments.followed)} moments, {moments.followed.mean():.3f} followed")
        print(fit(moments))
    _print_tables(tested)
    if args.leave_out:
        print("\nfamilies left out of the fit in turn")
        print_calibration(left_out(moments_of(fitted), moments_of(tested)))


def _print_tables(tested: list[Trace]) -> None:
    diverged = sum(run.onset() is not None for run in tested)
    print(f"{len(tested)} runs, {diverged} diverge")
    print_worth(tested)
    print_families(tested)
    moments = moments_of(tested)
    print(f"{len(moments.followed)} moments, {moments.followed.mean():.3f} followed")
    risks = [risk_of(row) for row in moments.features.tolist()]
    print_calibration(list(zip(risks, moments.followed.tolist(), strict=True)))


if __name__ == "__main__":
    main()
