"""The last known good checkpoint of a run: where it lies, and how the run behind it ended.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lit_stability.training_state.atomic_write import write_atomically

FOLDER = "good"
"""Name of the folder, in the run's own, that good checkpoints lie in."""

_NAME = re.compile(r"step=(\d+)(?:-v(\d+))?\.ckpt")

State = Literal["running", "finished", "interrupted", "failed"]
_STATES = get_args(State)


def find_last_good(directory: str | Path) -> Path | None:
    """The newest good checkpoint below a directory by its step, or None.

    Give it to ``Trainer.fit(ckpt_path=...)`` of a trainer with a `LastKnownGood`, which goes on
    from it exactly where it was taken.

    Args:
        directory: a run's folder, one above several, or a folder of good checkpoints itself.
    """
    directory = Path(directory)
    folders = [f for f in directory.rglob(FOLDER) if f.is_dir()]
    if directory.name == FOLDER:
        folders.append(directory)
    found = [file for folder in folders for file in good_files(folder)]
    whole = [file for file in found if zipfile.is_zipfile(file)]
    return max(whole, key=_age, default=None)


def good_files(folder: Path) -> list[Path]:
    """Good checkpoints in a folder, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted((f for f in folder.iterdir() if _NAME.fullmatch(f.name)), key=_age)


def step_of(file: Path) -> int:
    """The step a good checkpoint was taken at.

    >>> step_of(Path("good/step=00000120-v1.ckpt"))
    120
    """
    match = _NAME.fullmatch(file.name)
    assert match is not None, file
    return int(match[1])


def free_path(folder: Path, step: int) -> Path:
    """A name for a checkpoint of this step that no file has yet."""
    path, version = folder / f"step={step:08d}.ckpt", 0
    while path.exists():
        version += 1
        path = folder / f"step={step:08d}-v{version}.ckpt"
    return path


def put_aside(folder: Path) -> Path | None:
    """Rename a folder that holds good checkpoints, so that those of another run can follow.

    Returns its new name; None where there was nothing to put aside.

    Raises:
        OSError: if it cannot be renamed.
    """
    if not good_files(folder):
        return None
    number = 1
    while (other := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(other)


def _age(file: Path) -> tuple[int, int, int]:
    match = _NAME.fullmatch(file.name)
    assert match is not None, file
    return int(match[1]), file.stat().st_mtime_ns, int(match[2] or 0)


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a run ended, as ``run.json`` beside its good checkpoints says.

    A process that was killed cannot write: its file goes on saying ``running``.
    """

    state: State
    step: int = 0
    reason: str = ""
    """The exception, where there was one."""
    checkpoint: str | None = None
    """Name of the newest good checkpoint when this was written, or of the one resumed from."""
    failures: int = 0
    """Runs in a row that ended in an exception without a newer good checkpoint."""

    def write(self, folder: Path) -> None:
        """Write it into a folder of good checkpoints.

        Raises:
            OSError: if it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"schema": 1, **asdict(self)}, indent=2) + "\n"
        write_atomically(folder / "run.json", content.encode(), partial=".part-run.json")

    @classmethod
    def read(cls, folder: Path) -> RunEnd | None:
        """Read it, or None where there is none or it is no such file."""
        try:
            raw: Any = json.loads((folder / "run.json").read_text(encoding="utf8"))
        except (OSError, ValueError):
            return None
        ours = isinstance(raw, dict) and raw.get("schema") == 1 and raw.get("state") in _STATES
        return cls(**{k: raw[k] for k in cls.__dataclass_fields__ if k in raw}) if ours else None

    def failures_behind(self, checkpoint: Path) -> int:
        """Failures in a row of runs that had this checkpoint as their newest.

        >>> RunEnd(state="failed", checkpoint="a", failures=1).failures_behind(Path("good/a"))
        1
        >>> RunEnd(state="running", checkpoint="a", failures=1).failures_behind(Path("good/b"))
        0
        """
        return self.failures if self.checkpoint == checkpoint.name else 0

    def in_words(self) -> str:
        """How the run ended, for a line on the console."""
        why = f": {self.reason}" if self.reason else ""
        return {
            "running": "was killed or is still running",
            "finished": f"finished at step {self.step}",
            "interrupted": f"was interrupted at step {self.step}{why}",
            "failed": f"failed at step {self.step}{why}",
        }[self.state]
