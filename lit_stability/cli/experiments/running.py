"""Runs each experiment in its own process, and compares its outcome with its expectation.

Imports neither torch nor Lightning: a run that crashes its interpreter does not affect the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_stability.cli.config import compose, resolve
from lit_stability.cli.experiments.expectation import Expectation
from lit_stability.cli.experiments.judgement import Verdict, judge
from lit_stability.cli.experiments.outcome import Outcome
from lit_stability.cli.experiments.process import fit_in_process, last_line
from lit_stability.cli.instantiate import bind
from lit_stability.cli.run_folders import put_aside
from lit_stability.errors import ConfigError

_SHOWN_INCIDENT = ("step", "kind", "cause", "outcome", "responses")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment that is ready to run."""

    name: str
    about: str
    expect: Expectation
    run_dir: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of an experiment that was run."""

    name: str
    about: str
    verdicts: tuple[Verdict, ...]
    incidents: tuple[dict[str, Any], ...]
    """Step, kind, leading cause, outcome and responses of each incident."""
    seconds: float
    """Wall-clock time of the process in s, including imports."""
    run_dir: str

    @property
    def met(self) -> bool:
        """Returns whether every item was as expected."""
        return all(each.met for each in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as JSON types."""
        return {"met": self.met, **asdict(self)}


def plan(name: str, folder: Path, overrides: Sequence[str]) -> Experiment:
    """Composes an experiment and checks its expectation, but no other option.

    Args:
        name: name of a config.
        folder: parent folder of the run's folder.
        overrides: ``KEY=VALUE`` items that override the config.

    Raises:
        ConfigError: if the config cannot be composed, or its expectation is invalid.
    """
    run_dir = folder / name
    config = resolve(compose([name], [*overrides, f"run_dir={run_dir}"]))
    expect = expectation_of(name, config)
    about = str(config.get("about") or "")
    return Experiment(
        name=name, about=about, expect=expect, run_dir=run_dir, overrides=tuple(overrides)
    )


def expectation_of(name: str, config: Mapping[str, Any]) -> Expectation:
    """Returns the expectation of a config.

    Args:
        name: of the experiment, for messages.
        config: resolved.

    Raises:
        ConfigError: if it is invalid.
    """
    problems: list[str] = []
    built = bind(Expectation, config.get("expect") or {}, "expect", problems)
    if problems:
        raise ConfigError(*(f"{name}: {each}" for each in problems))
    try:
        return Expectation(**built.options)
    except ValueError as error:
        raise ConfigError(f"{name}: expect: {error}") from error


def run(experiment: Experiment) -> Result:
    """Runs an experiment in its own process and judges it; a failure is a verdict, not an error.

    Its output is written to ``output.txt`` in its folder. The folder of an earlier run is renamed.

    Raises:
        KeyboardInterrupt: after the process, which is interrupted as well, has ended.
    """
    put_aside(experiment.run_dir)
    ended = fit_in_process(["-c", experiment.name, *experiment.overrides], experiment.run_dir)
    try:
        outcome = Outcome.read(experiment.run_dir)
    except ValueError as error:
        return _without_outcome(experiment, str(error), ended.seconds)
    if outcome is None or outcome.ending.started < ended.started:
        observed = last_line(experiment.run_dir, ended.code)
        return _without_outcome(experiment, observed, ended.seconds)
    incidents = [{key: each.get(key) for key in _SHOWN_INCIDENT} for each in outcome.incidents]
    return Result(
        name=experiment.name,
        about=experiment.about,
        verdicts=tuple(judge(experiment.expect, outcome)),
        incidents=tuple(incidents),
        seconds=ended.seconds,
        run_dir=str(experiment.run_dir),
    )


def _without_outcome(experiment: Experiment, observed: str, seconds: float) -> Result:
    return Result(
        name=experiment.name,
        about=experiment.about,
        verdicts=(Verdict(experiment.expect.ends, observed, False),),
        incidents=(),
        seconds=seconds,
        run_dir=str(experiment.run_dir),
    )
