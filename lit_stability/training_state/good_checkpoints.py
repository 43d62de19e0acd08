"""The good checkpoints of a run: where they are, and how the run that wrote them ended.

Imports neither torch nor Lightning.
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from lit_stability.lightning_choice import suite_logger
from lit_stability.redaction import redacted_tree
from lit_stability.training_state.atomic_write import write_atomically
from lit_stability.training_state.checkpoint_file import first_whole
from lit_stability.training_state.run_names import RUNS

log = suite_logger()

FOLDER = "good"
"""Name of the folder inside the run's folder that holds the good checkpoints."""

MAIN = "checkpoint.ckpt"
"""Name of the file with the weights, in the folder of a good checkpoint that replicas wrote."""

PART = ".part"
"""Ending of a folder that several ranks write to, until it is complete."""

_NAME = re.compile(r"step=(\d+)(?:-v(\d+))?(\.ckpt)?")

State = Literal["running", "finished", "interrupted", "failed"]
_STATES = get_args(State)


def find_last_good(directory: str | Path) -> Path | None:
    """Returns the good checkpoint of the highest step below a directory, or None.

    A damaged file is logged and ignored; the one before it is returned.

    Pass it to ``Trainer.fit(ckpt_path=...)`` of a trainer with a `LastKnownGood`, which continues
    exactly where the checkpoint was captured. Several ranks write a folder: what is returned then
    is the file of the weights inside it, or, if the weights are sharded, the folder.

    >>> find_last_good("no/such/run") is None
    True

    Args:
        directory: the folder of a run, a folder that contains several runs, or a folder of good
            checkpoints. Of runs without a logger only the newest counts, which may have made
            fewer steps than the one before.
    """
    directory = Path(directory)
    folders = [f for f in directory.rglob(FOLDER) if f.is_dir()]
    if directory.name == FOLDER:
        folders.append(directory)
    found = of_newest_runs(file for folder in folders for file in good_files(folder))
    newest = first_whole(sorted(found, key=_age, reverse=True))
    return None if newest is None else to_load(newest)


def of_newest_runs(files: Iterable[Path]) -> list[Path]:
    """Leaves out the checkpoints of all but the newest of the runs without a logger.

    >>> of_newest_runs(map(Path, ["stability/1/good/a", "stability/2/good/b", "tb/0/good/c"]))
    [PosixPath('stability/2/good/b'), PosixPath('tb/0/good/c')]
    """
    listed = list(files)
    newest: dict[Path, Path] = {}
    for file in listed:
        run = file.parents[1]
        newest[run.parent] = max(run, newest.get(run.parent, run))
    return [f for f in listed if f.parents[2].name != RUNS or newest[f.parents[2]] == f.parents[1]]


def good_files(folder: Path) -> list[Path]:
    """Returns the good checkpoints in a folder, oldest first: files, and folders of ranks."""
    if not folder.is_dir():
        return []
    return sorted(filter(_is_good, folder.iterdir()), key=_age)


def good_checkpoint_of(path: Path | None) -> Path | None:
    """Returns the good checkpoint that a ``ckpt_path`` is, or is a file of; None if it is none.

    >>> good_checkpoint_of(Path("good/step=00000120/checkpoint.ckpt"))
    PosixPath('good/step=00000120')
    >>> good_checkpoint_of(Path("checkpoints/last.ckpt"))
    """
    path = None if path is None else folder_of(path) or path
    return path if path is not None and path.parent.name == FOLDER else None


def folder_of(path: Path) -> Path | None:
    """Returns the folder of several ranks that a ``ckpt_path`` is, or is the main file of, or None.

    >>> folder_of(Path("good/step=00000120/checkpoint.ckpt"))
    PosixPath('good/step=00000120')
    """
    if path.name == MAIN:
        return path.parent
    return path if path.is_dir() else None


def step_of(path: Path) -> int:
    """Returns the step at which a good checkpoint was captured.

    >>> step_of(Path("good/step=00000120-v1.ckpt"))
    120
    >>> step_of(Path("good/step=00000120/checkpoint.ckpt"))
    120
    """
    match = _NAME.fullmatch(path.parent.name if path.name == MAIN else path.name)
    assert match is not None, path
    return int(match[1])


def to_load(path: Path) -> Path:
    """Returns what Lightning loads of a checkpoint: replicas have written one file for all."""
    return path / MAIN if (path / MAIN).exists() else path


def free_path(folder: Path, step: int, ending: str = ".ckpt") -> Path:
    """Returns a path for a checkpoint of this step that does not exist yet.

    Args:
        folder: of the good checkpoints.
        step: at which it was captured.
        ending: of the name; empty for the folder of several ranks.
    """
    path, version = folder / f"step={step:08d}{ending}", 0
    while path.exists():
        version += 1
        path = folder / f"step={step:08d}-v{version}{ending}"
    return path


def prune(folder: Path, step: int, keep: int) -> None:
    """Deletes good checkpoints, the oldest first; those of later steps are unchanged.

    Args:
        folder: of the good checkpoints.
        step: of the newest of this run: a run that got further may have left later ones.
        keep: number of checkpoints that stay.

    Raises:
        OSError: if one cannot be deleted.
    """
    older = [path for path in good_files(folder) if step_of(path) <= step]
    for path in older[:-keep]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def put_aside(folder: Path) -> Path | None:
    """Renames a folder that holds good checkpoints, to make room for those of another run.

    Returns:
        The new path, or None if the folder holds no good checkpoints.

    Raises:
        OSError: if the folder cannot be renamed.
    """
    if not good_files(folder):
        return None
    number = 1
    while (other := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(other)


def _age(path: Path) -> tuple[int, int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), path.stat().st_mtime_ns, int(match[2] or 0)


def _is_good(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    return match is not None and path.is_file() == bool(match[3])


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a run ended, as recorded in ``run.json`` next to its good checkpoints.

    A killed process cannot update the file: its state stays ``running``.
    """

    state: State
    step: int = 0
    reason: str = ""
    """The exception that ended the run, if any."""
    checkpoint: str | None = None
    """Name of the newest good checkpoint at the time of writing, or of the one resumed from."""
    failures: int = 0
    """Number of consecutive runs that ended in an exception without a newer good checkpoint."""

    def write(self, folder: Path) -> None:
        """Writes ``run.json`` into a folder of good checkpoints.

        Raises:
            OSError: if the file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        row = redacted_tree({"schema": 1, **asdict(self)})
        content = (json.dumps(row, indent=2) + "\n").encode()
        # The exception that ended the run may quote anything.
        write_atomically(folder / "run.json", content, partial=".part-run.json", private=True)

    @classmethod
    def read(cls, folder: Path) -> "RunEnd | None":
        """Reads ``run.json``; returns None if it is missing, or not valid, which is logged."""
        file = folder / "run.json"
        try:
            raw: Any = json.loads(file.read_text(encoding="utf8"))
        except OSError:
            return None
        except (ValueError, RecursionError) as error:
            log.warning("%s is damaged and ignored: not valid JSON (%s)", file, error)
            return None
        problem = _problem_of(raw)
        if problem is not None:
            log.warning("%s is ignored: %s", file, problem)
            return None
        return cls(**{k: raw[k] for k in cls.__dataclass_fields__ if k in raw})

    def failures_behind(self, checkpoint: Path) -> int:
        """Returns the number of consecutive failed runs whose newest checkpoint was this one.

        >>> RunEnd(state="failed", checkpoint="a", failures=1).failures_behind(Path("good/a"))
        1
        >>> RunEnd(state="running", checkpoint="a", failures=1).failures_behind(Path("good/b"))
        0
        """
        return self.failures if self.checkpoint == checkpoint.name else 0

    def in_words(self) -> str:
        """Returns how the run ended, as text for the console."""
        why = f": {self.reason}" if self.reason else ""
        return {
            "running": "was killed or is still running",
            "finished": f"finished at step {self.step}",
            "interrupted": f"was interrupted at step {self.step}{why}",
            "failed": f"failed at step {self.step}{why}",
        }[self.state]


def _problem_of(raw: Any) -> str | None:
    """Returns why the content of ``run.json`` is not a `RunEnd`; None if it is one."""
    if not isinstance(raw, dict):
        return f"expected a mapping, got a {type(raw).__name__}"
    if raw.get("schema") != 1:
        return f"schema={raw.get('schema')!r}, this version reads 1"
    if raw.get("state") not in _STATES:
        return f"state={raw.get('state')!r}, expected one of {', '.join(_STATES)}"
    kinds = {"step": (int,), "failures": (int,), "reason": (str,), "checkpoint": (str, NoneType)}
    for key, kind in kinds.items():
        if key in raw and type(raw[key]) not in kind:
            return f"{key}={raw[key]!r} has the wrong type"
    negative = next((key for key in ("step", "failures") if raw.get(key, 0) < 0), None)
    return None if negative is None else f"{negative}={raw[negative]} is negative"
