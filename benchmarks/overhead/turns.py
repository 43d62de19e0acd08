"""Several Trainers in one process that take turns, step by step: all meet the same noise."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from benchmarks.overhead.clock import HookClock
from benchmarks.overhead.suites import SUITES, Suite
from benchmarks.results import Spread

BLOCK = 20
"""Steps that are added up: as many as lie between two snapshots of `AutoRollback`."""


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    config: ByteGPTConfig
    batch: int = 8
    steps: int = 120
    precision: Any = "32-true"


@dataclass(frozen=True)
class Times:
    """Seconds of each step of one Trainer."""

    steps: list[float]
    hooks: list[float]
    """Those spent in the suite's hooks, and in fetching the batch."""


class Turns:
    """Whose turn it is, of several threads that are numbered from 0."""

    def __init__(self, count: int) -> None:
        self._there = list(range(count))
        self._whose: int | None = None
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Give the first of them its turn."""
        with self._changed:
            self._whose = self._there[0]
            self._changed.notify_all()

    def wait(self, index: int) -> None:
        """Wait for one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._whose == index)

    def pass_on(self, index: int, *, leave: bool = False) -> None:
        """Give the turn to the next; and take no further part."""
        with self._changed:
            if self._whose == index:
                later = [i for i in self._there if i > index]
                self._whose = (later or self._there)[0]
            if leave and index in self._there:
                self._there.remove(index)
            self._changed.notify_all()


class Baton(Callback):
    """Lets one Trainer at a time take a step, and times it."""

    def __init__(self, turns: Turns, index: int, clock: HookClock) -> None:
        self.turns, self.index, self.clock = turns, index, clock
        self.times: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the first turn."""
        self.clock.watch_fetches(trainer)
        self._wait()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Pass the baton, and wait until it comes back."""
        self.times.append(time.perf_counter() - self.last)
        self.clock.next_step()
        self.turns.pass_on(self.index)
        self._wait()

    def _wait(self) -> None:
        self.turns.wait(self.index)
        self.last = time.perf_counter()


def batches_of(setting: Setting) -> DataLoader[Any]:
    """The batches, made beforehand, so that to fetch one is no work."""
    data = loader(setting.batch, setting.config.length)
    return DataLoader([batch for batch, _ in zip(data, range(50), strict=False)], batch_size=None)


def make_trainer(suite: Suite, setting: Setting, callbacks: list[Callback]) -> Trainer:
    """A Trainer that prints nothing and writes below a temporary folder."""
    root = tempfile.mkdtemp()
    options = {
        "max_steps": setting.steps,
        "max_epochs": -1,
        "precision": setting.precision,
        "accelerator": "cpu",
        "callbacks": callbacks,
        "logger": TensorBoardLogger(root) if suite.tensorboard else False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": root,
    }
    return Trainer(**{**options, **suite.options})  # type: ignore[arg-type]


def take_turns(
    names: Iterable[str], setting: Setting, suites: Mapping[str, Suite] = SUITES
) -> dict[str, Times]:
    """Train a model under each suite, a step of one after a step of the other.

    A fit that raises, or ends early, has fewer steps; the others go on.
    """
    names = [*names]
    turns = Turns(len(names))
    batons = [_start(turns, i, suites[name], setting) for i, name in enumerate(names)]
    turns.begin()
    for thread, _ in batons:
        thread.join()
    pairs = zip(names, batons, strict=True)
    return {name: Times(b.times, b.clock.steps) for name, (_, b) in pairs}


def _start(
    turns: Turns, index: int, suite: Suite, setting: Setting
) -> tuple[threading.Thread, Baton]:
    seed_everything(0, verbose=False)
    callbacks = suite.callbacks()
    baton = Baton(turns, index, HookClock(callbacks))
    trainer = make_trainer(suite, setting, [*callbacks, baton])
    module, data = ByteGPTModule(setting.config), batches_of(setting)

    def fit() -> None:
        try:
            trainer.fit(module, data)
        except BaseException as error:
            print(f"a fit with {[type(c).__name__ for c in callbacks]} ended in {error!r}")
        finally:
            turns.pass_on(index, leave=True)

    thread = threading.Thread(target=fit)
    thread.start()
    time.sleep(0.5)
    return thread, baton


def ratios(times: list[float], baseline: list[float], block: int = BLOCK) -> Spread:
    """Of a block of steps to the baseline's block beside it; the first block warms up.

    >>> ratios([9.0, 9.0, 1.0, 3.0, 2.0, 4.0], [9.0, 9.0, 1.0, 1.0, 1.0, 1.0], block=2)
    Spread(median=2.5, low=2.25, high=2.75, count=2)
    """
    pairs = zip(blocks(times, block), blocks(baseline, block), strict=True)
    return Spread.of(m / b for m, b in pairs)


def blocks(steps: list[float], block: int = BLOCK) -> list[float]:
    """Sums of the steps, block by block; the first block, and what fills no block, left out."""
    starts = range(block, len(steps) - block + 1, block)
    return [sum(steps[i : i + block]) for i in starts]
