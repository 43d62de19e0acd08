"""Which folder a run of the command line writes to, and which one a command reads.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lit_stability.cli.config import RUN_DIR, resolve
from lit_stability.errors import ConfigError
from lit_stability.training_state.run_names import new_run_name

CONFIG = "config.yaml"
"""Name of the file that makes a folder the folder of a run."""
_HANDED_ON = "LIT_STABILITY_RUN"
"""Environment variable with the name of the run, for the processes that Lightning starts."""


def choose_run_dir(
    config: DictConfig, *, name: str | None, resume: str | None, overwrite: bool
) -> None:
    """Sets `run_dir` of a config to a folder of the run's own.

    By default it is ``runs/EXPERIMENT/<time>-<number>``, the same for all processes of a run and
    for what torchrun or SLURM starts again. With `resume` it is the folder of the newest run.

    Args:
        config: The composed config.
        name: Name of the folder; by default the time.
        resume: What to resume from: `last` and `good` continue the newest run.
        overwrite: Whether the folder may have an earlier run, which is deleted.

    Raises:
        ConfigError: The folder has an earlier run that is neither continued nor to be replaced.
    """
    given = OmegaConf.to_container(config)
    unset = isinstance(given, dict) and given.get("run_dir") == RUN_DIR
    if overwrite and unset and name is None:
        raise ConfigError("--overwrite: which run? add --name or run_dir=FOLDER")
    if name is not None:
        if not re.fullmatch(r"[\w.=+-]+", name) or name.strip(".") == "":
            raise ConfigError(f"--name {name}: use letters, digits and any of . = + _ -")
        config.run_dir = f"{RUN_DIR}/{name}"
    elif unset and resume in ("last", "good"):
        config.run_dir = str(newest_run(_run_dir(config)))
    elif unset:
        config.run_dir = f"{RUN_DIR}/{_name(_run_dir(config))}"
    folder = _run_dir(config)
    starts = is_first_process() and not _is_restarted()  # others find the folder of the run
    if starts and not (overwrite or resume) and is_run(folder):
        raise ConfigError(
            f"{folder}: has an earlier run, and two runs must not mix; add --resume last to "
            "continue it, --overwrite to replace it, or --name for another folder"
        )


def is_run(folder: Path) -> bool:
    """Returns whether a folder is that of a run."""
    return (folder / CONFIG).is_file()


def newest_run(folder: Path) -> Path:
    """Returns the newest run in a folder, which may be the folder itself; it too if there is none.

    Args:
        folder: Of a run, or one of several runs, such as `runs/NAME`.
    """
    if not folder.is_dir():
        return folder
    runs = [each for each in (folder, *folder.iterdir()) if is_run(each)]
    # The time of the file and not the name, which may have been chosen.
    return max(runs, key=lambda run: ((run / CONFIG).stat().st_mtime_ns, run.name), default=folder)


def delete_run(folder: Path) -> None:
    """Deletes the folder of a run.

    Raises:
        ConfigError: If it is no run, and so may be anything, or cannot be deleted.
    """
    if not folder.exists():
        return
    if not is_run(folder):
        if any(folder.iterdir()):
            raise ConfigError(f"{folder}: has no {CONFIG}, so it is no run and is not overwritten")
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be overwritten ({error})") from error


def put_aside(folder: Path) -> None:
    """Renames the folder of an earlier run to the next free number, such as ``NAME.1``.

    Raises:
        OSError: If it cannot be renamed.
    """
    if not is_run(folder):
        return
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(kept)


def _run_dir(config: DictConfig) -> Path:
    return Path(str(resolve(config)["run_dir"]))


def _name(folder: Path) -> str:
    """Returns the name of a new run, the same in all processes that train together."""
    if int(os.environ.get("LOCAL_RANK", "0")) and _HANDED_ON in os.environ:
        return os.environ[_HANDED_ON]  # of the process that has started this one
    own = new_run_name()
    job, task = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and "SLURM_NTASKS" in os.environ:
        own = f"slurm-{job}" + (f"-{task}" if task else "")
        if not task and not _is_restarted() and is_run(folder / own):
            own = f"{own}-{new_run_name()}"  # the script of the job runs several fits
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        from lit_stability.restart.torchrun import same_for_all_attempts

        own = same_for_all_attempts("run", own)
    os.environ[_HANDED_ON] = own
    return own


def _is_restarted() -> bool:
    restarts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in restarts)


def is_first_process() -> bool:
    """Returns whether this is the first of the processes that train together."""
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)
