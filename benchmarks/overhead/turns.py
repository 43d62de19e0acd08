"""Several Trainers in one process that take turns, step by step: all meet the same noise."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from benchmarks.overhead.clock import HookClock
from benchmarks.overhead.suites import SUITES, Suite
from benchmarks.results import Estimate
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor

BLOCK = 20
"""Steps of a block: as many as lie between two snapshots of `AutoRollback`."""
WARM = 3
"""Blocks to warm up: the second snapshot, which needs memory of its own, is taken in the last."""


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    config: ByteGPTConfig
    batch: int = 8
    steps: int = 120
    precision: Any = "32-true"
    lr: float = 1e-3


@dataclass(frozen=True)
class Times:
    """Seconds of each step of one Trainer."""

    steps: list[float]
    hooks: list[float]
    """Those spent in the suite's hooks, and in fetching the batch."""
    incidents: int
    """What the suite has met: a step that is treated is no step of a healthy run."""


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
        self.incidents = 0

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
    options: dict[str, Any] = {
        "max_steps": setting.steps,
        "precision": setting.precision,
        "callbacks": callbacks,
        "default_root_dir": root,
    }
    if suite.tensorboard:
        options["logger"] = TensorBoardLogger(root)
    return quiet_trainer(**{**options, **suite.options})


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
    return {name: Times(b.times, b.clock.steps, b.incidents) for name, (_, b) in pairs}


def _start(
    turns: Turns, index: int, suite: Suite, setting: Setting
) -> tuple[threading.Thread, Baton]:
    seed_everything(0, verbose=False)
    callbacks = suite.callbacks()
    baton = Baton(turns, index, HookClock(callbacks))
    trainer = make_trainer(suite, setting, [*callbacks, baton])
    module, data = ByteGPTModule(setting.config, lr=setting.lr), batches_of(setting)

    def fit() -> None:
        try:
            trainer.fit(module, data)
        except BaseException as error:
            print(f"a fit with {[type(c).__name__ for c in callbacks]} ended in {error!r}")
        finally:
            monitors = [c for c in callbacks if isinstance(c, GradientMonitor)]
            baton.incidents = sum(len(monitor.incidents) for monitor in monitors)
            turns.pass_on(index, leave=True)

    thread = threading.Thread(target=fit)
    thread.start()
    time.sleep(0.5)
    return thread, baton


def ratio(times: list[float], baseline: list[float], block: int = BLOCK) -> Estimate:
    """Of a step to the baseline's step beside it, what comes once in a block included.

    For each place in the block the median over the blocks, then the mean over the places: a step
    that the machine disturbed counts for nothing, a snapshot in every block counts. The first
    blocks, in which memory is first asked for, are left out. The interval is by bootstrap over
    the blocks (Efron 1979).

    >>> ratio([*[9.0] * 6, 1.0, 3.0, 1.0, 3.0, 8.0, 3.0], [1.0] * 12, block=2)
    Estimate(value=2.0, low=2.0, high=5.5)
    """
    found = in_blocks(times, block) / in_blocks(baseline, block)
    count = len(found)
    drawn = found[np.random.default_rng(0).integers(count, size=(2000, count))]
    low, high = np.quantile(np.median(drawn, axis=1).mean(axis=1), (0.025, 0.975))
    return Estimate(float(np.median(found, axis=0).mean()), float(low), float(high))


def in_blocks(steps: list[float], block: int = BLOCK) -> np.ndarray:
    """The steps, shape ``(blocks, block)``, without the first blocks and what fills no block.

    Raises:
        ValueError: if nothing is left.
    """
    kept = steps[WARM * block : len(steps) - len(steps) % block]
    if not kept:
        raise ValueError(f"{len(steps)} steps are {WARM} blocks of {block} to warm up or less")
    return np.reshape(kept, (-1, block))
