"""One run of one scenario under one protection, and what is known of it afterwards.

May import Lightning and torch.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.alternatives import PROTECTIONS, Protection
from benchmarks.alternatives.shipped import Suite
from benchmarks.rescue.scenario import Scenario
from benchmarks.trainers import quiet_trainer
from lit_stability import Incident
from lit_stability.incidents.report import responses_text

Ending = Literal["finished", "stopped", "NaN", "failed", "hung"]
"""``stopped``: by the protection, on purpose. ``NaN``: finished with a loss that is none.
``failed``: by an error that nobody meant. ``hung``: ended by the clock."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended; JSON types only."""

    scenario: str
    protection: str
    seed: int
    ended: Ending
    message: str = ""
    """What was said where it did not finish."""
    loss: float | None = None
    """Held-out loss, None where it is not finite."""
    batches: int = 0
    """Batches trained on, some of them perhaps twice."""
    updates: int | None = None
    """Updates in the final weights, by the optimizer's own count, which a rollback takes back with
    its state; None where the optimizer counts none."""
    alarms: tuple[int, ...] = ()
    """Batches at which the protection said that something is wrong, counted as ``batches`` is."""
    cause: str = ""
    """What the suite says that it came from, in the first incident that it answered."""
    incidents: tuple[str, ...] = ()
    """What the suite noticed, did and reached, a line each."""
    seconds: float = 0.0
    """Wall-clock time of the fit."""
    cpu_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Outcome:
        """Read what `as_dict` wrote."""
        lists = {name: tuple(row[name]) for name in ("alarms", "incidents")}
        return cls(**(row | lists))


class Witness(Callback):
    """Counts the batches, and looks after each whether the protection has said something.

    Args:
        protection: to be asked.
    """

    def __init__(self, protection: Protection) -> None:
        self.protection, self.batches = protection, 0
        self.alarms: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Count."""
        self.batches += 1

    def on_train_batch_end(self, *args: Any) -> None:
        """Ask."""
        self.ask()

    def ask(self) -> None:
        """Put down the batch of each new alarm, the first batch being 0."""
        new = self.protection.alarms() - len(self.alarms)
        self.alarms += [self.batches - 1] * new


def run(scenario: Scenario, protection_name: str, seed: int) -> Outcome:
    """Train from a seed through a scenario."""
    protection = PROTECTIONS[protection_name]()
    reference = Witness(protection)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        seed_everything(seed, verbose=False)
        module, data = scenario.task.module(), scenario.task.data(seed)
        scenario.trouble.spoil(data)
        trainer = _trainer(scenario, protection, reference, Path(folder))
        wall, cpu = time.perf_counter(), time.process_time()
        ended, message = _fit(trainer, module, data, protection)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        reference.ask()
        updates = _updates(trainer.optimizers)
        loss = scenario.task.held_out(module, seed)
    finite = math.isfinite(loss)
    return Outcome(
        scenario=scenario.name,
        protection=protection_name,
        seed=seed,
        ended="NaN" if ended == "finished" and not finite else ended,
        message=message,
        loss=loss if finite else None,
        batches=reference.batches,
        updates=updates,
        alarms=tuple(reference.alarms),
        **_told(protection, scenario.step),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def _trainer(
    scenario: Scenario, protection: Protection, reference: Witness, folder: Path
) -> Trainer:
    task = scenario.task
    return quiet_trainer(
        max_steps=task.steps,
        devices=1,
        default_root_dir=folder,
        callbacks=[
            *scenario.trouble.callbacks(),
            *task.callbacks(),
            *protection.callbacks(folder),
            reference,
        ],
        **task.trainer(),
        **protection.trainer_options(),
    )


def _fit(
    trainer: Trainer, module: LightningModule, data: Any, protection: Protection
) -> tuple[Ending, str]:
    """Train; whatever is raised is a way to end."""
    try:
        trainer.fit(module, data)
    except protection.stops() as stop:
        return "stopped", str(stop)
    # Of a protection nothing is known that it may not do.
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    finally:
        # An injector that was not torn down, as after an exception, would spoil the evaluation.
        vars(module).pop("training_step", None)
    return "finished", ""


def _updates(optimizers: Iterable[torch.optim.Optimizer]) -> int | None:
    steps = [int(s["step"]) for o in optimizers for s in o.state.values() if "step" in s]
    return max(steps, default=None)


def _told(protection: Protection, step: int) -> dict[str, Any]:
    """What a suite says of its incidents; nobody else says any of it."""
    if not isinstance(protection, Suite):
        return {}
    since = [each for each in protection.incidents if each.first.step >= step]
    answered = next((each for each in since if each.responses), since[0] if since else None)
    return {
        "cause": answered.cause if answered else "",
        "incidents": tuple(_line(each) for each in protection.incidents),
    }


def _line(incident: Incident) -> str:
    noticed = f"step {incident.first.step}: {incident.first.kind}"
    cause, done = incident.cause or "no cause", responses_text(incident) or "told"
    return f"{noticed}; {cause} -> {done}; {incident.outcome}"
