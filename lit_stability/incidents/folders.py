"""The folders of incidents on disk: which belong to a run, and which are pruned to make room.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from lit_stability.outside import tried

REPORT = "report.md"
"""Name of the file of a folder that is never deleted."""
HISTORY = "history.json"
"""Name of the file of a folder that has, among others, the id of the run."""
_DAY = 24 * 3600.0


def prune(newest: Path, run: str, rank: int, max_folders: int, max_bytes: int) -> list[Path]:
    """Deletes all but the reports of the oldest folders of a run; returns these folders.

    The first and the newest stay whole. Folders of another run, and folders that have only a report
    left, are not counted.

    Args:
        newest: the folder that was written last.
        run: id of the run.
        rank: whose folders are counted.
        max_folders: number of folders that stay whole.
        max_bytes: their total size, in bytes.

    Raises:
        OSError: if a file cannot be deleted.
    """
    named = newest.parent.glob(f"*-rank{rank}*" if rank else "*")
    own = [f for f in named if (rank or "-rank" not in f.name) and _run_of(f) == run]
    folders = sorted(own, key=lambda f: f.stat().st_mtime_ns)
    removable = [f for f in folders[1:] if f != newest]
    sizes = {f: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in folders}
    pruned = []
    while removable and (len(sizes) > max_folders or sum(sizes.values()) > max_bytes):
        pruned.append(removable.pop(0))
        _keep_report(pruned[-1])
        del sizes[pruned[-1]]
    return pruned


def part_prefix(run: str) -> str:
    """Returns how the name of a partial folder of a run begins."""
    return f".part-{run}-"


def delete_parts(root: Path, run: str) -> None:
    """Deletes partial folders of a run that was killed, and any that are older than a day.

    A younger one of another run may be written right now.
    """
    for part in root.glob(".part-*"):
        old = time.time() - part.stat().st_mtime > _DAY
        if old or part.name.startswith(part_prefix(run)):
            shutil.rmtree(part, ignore_errors=True)


def _run_of(folder: Path) -> str | None:
    """Returns the id of the run that wrote a folder; None if it has only its report, or no id."""
    if folder.name.startswith("."):
        return None
    found, _ = tried(lambda: json.loads((folder / HISTORY).read_text(encoding="utf8")))
    run = found.get("run") if isinstance(found, dict) else None
    return run if isinstance(run, str) else None


def _keep_report(folder: Path) -> None:
    # First, so that a folder of which only a part can be deleted is not counted again.
    (folder / HISTORY).unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != REPORT:
            path.unlink()
