"""Runs one scenario with one protection and collects its outcome. Imports Lightning and torch."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.alternatives import Protection, find
from benchmarks.alternatives.shipped import Suite
from benchmarks.healthy.run import digest
from benchmarks.rescue.scenario import Scenario
from benchmarks.trainers import quiet_trainer
from lit_stability import Incident
from lit_stability.incidents.report import responses_text

Ending = Literal["finished", "stopped", "NaN", "failed", "hung"]
"""``stopped``: on purpose, by the protection. ``NaN``: finished with a non-finite loss.
``failed``: by an unexpected error. ``hung``: by the time limit."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a run; its fields have JSON types."""

    scenario: str
    protection: str
    seed: int
    ended: Ending
    message: str = ""
    """Error or reason, if the run did not finish."""
    loss: float | None = None
    """Held-out loss; None if it is not finite."""
    weights: str = ""
    """Digest of the final weights and buffers; equal for two runs if they are bit-identical."""
    batches: int = 0
    """Batches trained on, repeated ones included."""
    updates: int | None = None
    """Updates in the final weights, by the step count in the optimizer's state, which a rollback
    restores too; None if the optimizer has no count."""
    alarms: tuple[int, ...] = ()
    """Batches at which the protection raised an alarm, counted like ``batches``."""
    alarm_kinds: tuple[str, ...] = ()
    """What each alarm is, in the protection's words."""
    cause: str = ""
    """Cause that the suite named in the first incident it responded to."""
    incidents: tuple[str, ...] = ()
    """One line per incident of the suite: kind, cause, response and outcome."""
    seconds: float = 0.0
    """Wall-clock time of the fit."""
    cpu_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the outcome as a JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Outcome:
        """Creates an outcome from the result of `as_dict`."""
        lists = {name: tuple(row.get(name, ())) for name in ("alarms", "alarm_kinds", "incidents")}
        return cls(**(row | lists))


class AlarmRecorder(Callback):
    """Counts the batches and records at which of them the protection raised an alarm.

    Args:
        protection: The protection of the run.
    """

    def __init__(self, protection: Protection) -> None:
        self.protection, self.batches = protection, 0
        self.alarms: list[int] = []
        self.kinds: list[str] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Counts the batch."""
        self.batches += 1

    def on_train_batch_end(self, *args: Any) -> None:
        """Records new alarms."""
        self.record()

    def record(self) -> None:
        """Records the batch of each new alarm; the first batch is 0."""
        new = self.protection.alarms()[len(self.alarms) :]
        self.kinds += new
        self.alarms += [self.batches - 1] * len(new)


def run(
    scenario: Scenario, protection_name: str, seed: int, observers: Sequence[Callback] = ()
) -> Outcome:
    """Runs a scenario with a protection and a seed.

    Args:
        scenario: To run.
        protection_name: See `benchmarks.alternatives.find`.
        seed: Of the weights, the data and everything drawn in training.
        observers: Callbacks that change nothing; they come before those of the protection.
    """
    protection = find(protection_name)()
    recorder = AlarmRecorder(protection)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        seed_everything(seed, verbose=False)
        module, data = scenario.task.module(), scenario.task.data(seed)
        scenario.disturbance.corrupt(data)
        trainer = _trainer(scenario, protection, [*observers], recorder, Path(folder))
        wall, cpu = time.perf_counter(), time.process_time()
        ended, message = _fit(trainer, module, data, protection)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        recorder.record()
        updates, weights = _updates(trainer.optimizers), digest(module.state_dict())
        loss = scenario.task.held_out(module, seed)
    finite = math.isfinite(loss)
    return Outcome(
        scenario=scenario.name,
        protection=protection.name,
        seed=seed,
        ended="NaN" if ended == "finished" and not finite else ended,
        message=message,
        loss=loss if finite else None,
        weights=weights,
        batches=recorder.batches,
        updates=updates,
        alarms=tuple(recorder.alarms),
        alarm_kinds=tuple(recorder.kinds),
        **_suite_report(protection, scenario.step),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def _trainer(
    scenario: Scenario,
    protection: Protection,
    observers: list[Callback],
    recorder: AlarmRecorder,
    folder: Path,
) -> Trainer:
    task = scenario.task
    # What the run itself sets, such as its own clipping, takes precedence.
    options = protection.trainer_options() | task.trainer()
    return quiet_trainer(
        max_steps=task.steps,
        devices=1,
        default_root_dir=folder,
        callbacks=[
            *scenario.disturbance.callbacks(),
            *task.callbacks(),
            *observers,
            *protection.callbacks(folder),
            recorder,
        ],
        **options,
    )


def _fit(
    trainer: Trainer, module: LightningModule, data: Any, protection: Protection
) -> tuple[Ending, str]:
    """Trains; an exception is one of the ways to end."""
    try:
        trainer.fit(module, data)
    except protection.stops() as stop:
        return "stopped", str(stop)
    # A third-party protection may raise anything.
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    finally:
        # After an exception a fault injector is not torn down and would disturb the evaluation.
        vars(module).pop("training_step", None)
    return "finished", ""


def _updates(optimizers: Iterable[torch.optim.Optimizer]) -> int | None:
    steps = [int(s["step"]) for o in optimizers for s in o.state.values() if "step" in s]
    return max(steps, default=None)


def _suite_report(protection: Protection, step: int) -> dict[str, Any]:
    """Returns cause and incidents of this suite; nothing for other protections."""
    if not isinstance(protection, Suite):
        return {}
    since = [incident for incident in protection.incidents if incident.first.step >= step]
    first = next(
        (incident for incident in since if incident.responses), since[0] if since else None
    )
    return {
        "cause": first.cause if first else "",
        "incidents": tuple(_line(incident) for incident in protection.incidents),
    }


def _line(incident: Incident) -> str:
    anomaly = f"step {incident.first.step}: {incident.first.kind}"
    cause, response = incident.cause or "no cause", responses_text(incident) or "reported"
    return f"{anomaly}; {cause} -> {response}; {incident.outcome}"
