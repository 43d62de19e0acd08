"""Experiments run one after another, each in a process of its own, and judged by what they leave.

Imports neither torch nor Lightning: a run that takes its interpreter down takes no other with it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_stability.cli.config import compose, resolve
from lit_stability.cli.experiments.expectation import Expectation
from lit_stability.cli.experiments.judgement import Verdict, judge
from lit_stability.cli.experiments.outcome import Outcome
from lit_stability.cli.instantiate import bind
from lit_stability.errors import ConfigError

OUTPUT = "output.txt"
"""What a run prints, in its folder."""
_GRACE = 10.0
"""Seconds that an interrupted run has to end by itself."""
_SHOWN_INCIDENT = ("step", "kind", "cause", "outcome", "responses")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An experiment about to be run."""

    name: str
    about: str
    expect: Expectation
    run_dir: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """An experiment that was run."""

    name: str
    about: str
    verdicts: tuple[Verdict, ...]
    incidents: tuple[dict[str, Any], ...]
    """Step, kind, leading cause, outcome and responses of each."""
    seconds: float
    """Wall-clock time of the process, imports included."""
    run_dir: str

    @property
    def met(self) -> bool:
        """Whether all was as expected."""
        return all(each.met for each in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {"met": self.met, **asdict(self)}


def plan(name: str, folder: Path, overrides: Sequence[str]) -> Trial:
    """Compose an experiment and read what it expects; nothing else of it is checked here.

    Args:
        name: of a config.
        folder: that is to hold the folder of the run.
        overrides: ``KEY=VALUE``, laid over the config.

    Raises:
        ConfigError: it cannot be composed, or its expectation cannot be read.
    """
    run_dir = folder / name
    config = resolve(compose([name], [*overrides, f"run_dir={run_dir}"]))
    problems: list[str] = []
    built = bind(Expectation, config.get("expect") or {}, "expect", problems)
    if problems:
        raise ConfigError(*(f"{name}: {each}" for each in problems))
    try:
        expect = Expectation(**built.options)
    except ValueError as error:
        raise ConfigError(f"{name}: expect: {error}") from error
    about = str(config.get("about") or "")
    return Trial(name=name, about=about, expect=expect, run_dir=run_dir, overrides=tuple(overrides))


def run(trial: Trial) -> Result:
    """Run an experiment in a process of its own and judge it; its failure is a verdict, no error.

    What it prints is appended to ``output.txt`` in its folder.

    Raises:
        KeyboardInterrupt: after the process, which is interrupted as well, has ended.
    """
    trial.run_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with (trial.run_dir / OUTPUT).open("ab") as output:
        process = subprocess.Popen(_command(trial), stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait()
        except KeyboardInterrupt:
            # A terminal interrupts the whole group; whoever signals this process alone does not.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.terminate()
            process.wait()
            raise
    seconds = time.time() - started
    outcome = Outcome.read(trial.run_dir)
    if outcome is None or outcome.ending.started < started:
        return _broken(trial, process.returncode, seconds)
    incidents = [{key: each[key] for key in _SHOWN_INCIDENT} for each in outcome.incidents]
    return Result(
        name=trial.name,
        about=trial.about,
        verdicts=tuple(judge(trial.expect, outcome)),
        incidents=tuple(incidents),
        seconds=seconds,
        run_dir=str(trial.run_dir),
    )


def _command(trial: Trial) -> list[str]:
    quiet = "trainer.enable_progress_bar=false"  # in a file, a bar is one line per step
    own = [quiet, *trial.overrides, f"run_dir={trial.run_dir}"]
    return [sys.executable, "-m", "lit_stability.cli.main", "fit", "-c", trial.name, *own]


def _broken(trial: Trial, code: int, seconds: float) -> Result:
    """The result of a run that left no outcome, with the last line that it printed."""
    lines = (trial.run_dir / OUTPUT).read_text(encoding="utf8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")
    observed = f"exit code {code}: {said[:300]}"
    return Result(
        name=trial.name,
        about=trial.about,
        verdicts=(Verdict(trial.expect.ends, observed, False),),
        incidents=(),
        seconds=seconds,
        run_dir=str(trial.run_dir),
    )
