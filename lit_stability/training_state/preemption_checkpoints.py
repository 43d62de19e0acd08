"""The checkpoints that `PreemptionCheckpoint` saves. Imports neither torch nor Lightning."""

from pathlib import Path

from lit_stability.training_state.checkpoint_file import first_whole
from lit_stability.training_state.good_checkpoints import FOLDER as GOOD
from lit_stability.training_state.good_checkpoints import (
    good_files,
    of_newest_runs,
    step_of,
    to_load,
)

FOLDER = "preempted"
"""Name of the folder inside the run's folder that holds them."""


def find_resume_checkpoint(directory: str | Path) -> Path | None:
    """Returns the checkpoint of the highest step that a run can go on from, or None.

    That is one of `PreemptionCheckpoint` or a good one of `LastKnownGood`; where both are of the
    same step, the good one. A damaged file is logged and ignored.

    Args:
        directory: the folder of a run, or a folder that contains several runs, see
            `find_last_good`.

    >>> find_resume_checkpoint("no/such/folder") is None
    True
    """
    folders = [f for f in Path(directory).rglob("*") if f.name in (FOLDER, GOOD) and f.is_dir()]
    found = of_newest_runs(file for folder in folders for file in good_files(folder))
    newest = first_whole(sorted(found, key=_preference, reverse=True))
    return None if newest is None else to_load(newest)


def _preference(file: Path) -> tuple[int, bool, int]:
    return step_of(file), file.parent.name == GOOD, file.stat().st_mtime_ns
