"""How the commands `fit` and `resume` end: the exit code, and what is printed for the next step.

May import the configuration; torch and Lightning are imported only when a run has ended.
"""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from lit_stability.cli.config import resolve
from lit_stability.cli.experiments.judgement import judge
from lit_stability.cli.experiments.outcome import Outcome
from lit_stability.cli.experiments.running import expectation_of
from lit_stability.cli.run_folders import is_first_process
from lit_stability.errors import ConfigError
from lit_stability.printing import printable

INTERRUPTED = 130
"""Exit code after Ctrl-C, 128 + the number of SIGINT, as of other programs."""
NOT_MET = 4
"""Exit code with ``--strict`` if the expectation is not met."""


def run_to_end(config: DictConfig, run: Callable[[], object], *, strict: bool) -> int:
    """Runs an experiment and returns the exit code.

    Args:
        config: The composed config.
        run: Trains and writes the outcome.
        strict: Whether the exit code says if the expectation was met, however the run ended.

    Raises:
        ConfigError: The config cannot be run, or `strict` is set and it has no `expect`.
    """
    plain = resolve(config)
    if strict and not plain.get("expect"):
        raise ConfigError("--strict: the config has no `expect` with which to compare the run")
    folder = Path(str(plain["run_dir"]))
    try:
        run()
    except ConfigError:
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        if not _is_ctrl_c(error):
            raise
        if is_first_process():
            print(printable(f"interrupted; {how_to_go_on(folder)}"), file=sys.stderr)
        return INTERRUPTED
    except Exception:
        if not strict:
            raise
        traceback.print_exc()
    if not strict or not is_first_process():
        return 0
    outcome = Outcome.read(folder)
    expect = expectation_of(str(plain["experiment"]), plain)
    met = outcome is not None and all(each.met for each in judge(expect, outcome))
    return 0 if met else NOT_MET


def how_to_go_on(run: Path) -> str:
    """Returns the command that continues a run that was interrupted, or that there is none."""
    from lit_stability.training_state.preemption_checkpoints import find_resume_checkpoint

    if find_resume_checkpoint(run) is not None:
        return f"go on with: lit-stability resume {shlex.quote(str(run))}"
    if any(run.glob("**/checkpoints/*.ckpt")):
        config = shlex.quote(str(run / "config.yaml"))
        return f"go on with: lit-stability fit -c {config} --resume last"
    return "no checkpoint was written yet"


def _is_ctrl_c(error: BaseException) -> bool:
    """Returns whether Ctrl-C ended the run; Lightning makes a SystemExit of it."""
    return any(isinstance(each, KeyboardInterrupt) for each in (error, error.__context__))
