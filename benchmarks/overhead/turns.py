"""Runs several Trainers in one process step by step in turn, so that all have the same noise."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from benchmarks.overhead.clock import HookClock
from benchmarks.overhead.suites import SUITES, Suite
from benchmarks.results import Estimate
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor

BLOCK = 20
"""Steps of a block: the interval of two snapshots of `AutoRollback`."""
WARMUP_BLOCKS = 3
"""Warm-up blocks; in the last one the second snapshot is taken, which allocates its memory."""


@dataclass(frozen=True)
class Setting:
    """Model, data and precision of a measurement."""

    config: ByteGPTConfig
    batch: int = 8
    steps: int = 120
    precision: Any = "32-true"
    lr: float = 1e-3
    accelerator: str = "cpu"
    module: Callable[..., LightningModule] = ByteGPTModule

    def batches(self) -> DataLoader[Any]:
        """Returns precomputed batches, so that a fetch costs nothing."""
        data = loader(self.batch, self.config.length)
        batches = [batch for batch, _ in zip(data, range(50), strict=False)]
        return DataLoader(batches, batch_size=None)

    def stopwatch(self) -> Callable[[], float]:
        """Starts a clock; returns a function that gives the seconds until it is called.

        On a GPU that is the time of the stream, which is idle at both ends.
        """
        if self.accelerator == "cpu":
            before = time.perf_counter()
            return lambda: time.perf_counter() - before
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()

        def stop() -> float:
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3

        return stop

    def seconds_of(self, operation: Callable[[], Any]) -> float:
        """Returns how long an operation takes."""
        stop = self.stopwatch()
        operation()
        return stop()


@dataclass(frozen=True)
class Times:
    """Seconds of each step of one Trainer."""

    steps: list[float]
    hooks: list[float]
    """Seconds of each step in the suite's hooks and in the fetch of the batch."""
    incidents: int
    """Number of incidents; a fit with an incident is not a healthy run."""


class RoundRobin:
    """Lets threads, numbered from 0, run one at a time in order."""

    def __init__(self, count: int) -> None:
        self._active = list(range(count))
        self._current: int | None = None
        self._changed = threading.Condition()

    def start(self) -> None:
        """Lets the first thread run."""
        with self._changed:
            self._current = self._active[0]
            self._changed.notify_all()

    def wait(self, index: int) -> None:
        """Blocks until it is the thread's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._current == index)

    def pass_on(self, index: int, *, leave: bool = False) -> None:
        """Passes the turn to the next thread; with `leave` the thread gets no further turn."""
        with self._changed:
            if self._current == index:
                later = [i for i in self._active if i > index]
                self._current = (later or self._active)[0]
            if leave and index in self._active:
                self._active.remove(index)
            self._changed.notify_all()


class TurnTaker(Callback):
    """Waits for the Trainer's turn before each step, and times the step."""

    def __init__(self, turns: RoundRobin, index: int, clock: HookClock, setting: Setting) -> None:
        self.turns, self.index, self.clock, self.setting = turns, index, clock, setting
        self.times: list[float] = []
        self.incidents = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Waits for the first turn."""
        self.clock.watch_fetches(trainer)
        self._wait()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Records the step, passes the turn on and waits for the next one."""
        self.times.append(self.stop())
        self.clock.next_step()
        self.turns.pass_on(self.index)
        self._wait()

    def _wait(self) -> None:
        self.turns.wait(self.index)
        self.stop = self.setting.stopwatch()


def make_trainer(suite: Suite, setting: Setting, callbacks: list[Callback]) -> Trainer:
    """Creates a Trainer that prints nothing and writes to a temporary folder."""
    root = tempfile.mkdtemp()
    options: dict[str, Any] = {
        "max_steps": setting.steps,
        "precision": setting.precision,
        "accelerator": setting.accelerator,
        "devices": 1,
        "callbacks": callbacks,
        "default_root_dir": root,
    }
    if suite.tensorboard:
        options["logger"] = TensorBoardLogger(root)
    return quiet_trainer(**{**options, **suite.options})


def take_turns(
    names: Iterable[str], setting: Setting, suites: Mapping[str, Suite] = SUITES
) -> dict[str, Times]:
    """Trains one model per suite; the fits alternate step by step.

    A fit that raises or ends early has fewer steps; the others continue.
    """
    names = [*names]
    turns = RoundRobin(len(names))
    fits = [_start_fit(turns, i, suites[name], setting) for i, name in enumerate(names)]
    turns.start()
    for thread, _ in fits:
        thread.join()
    pairs = zip(names, fits, strict=True)
    return {name: Times(t.times, t.clock.steps, t.incidents) for name, (_, t) in pairs}


def _start_fit(
    turns: RoundRobin, index: int, suite: Suite, setting: Setting
) -> tuple[threading.Thread, TurnTaker]:
    seed_everything(0, verbose=False)
    callbacks = suite.callbacks()
    turn_taker = TurnTaker(turns, index, HookClock(callbacks), setting)
    trainer = make_trainer(suite, setting, [*callbacks, turn_taker])
    module, data = setting.module(setting.config, lr=setting.lr), setting.batches()

    def fit() -> None:
        try:
            trainer.fit(module, data)
        except BaseException as error:
            print(f"a fit with {[type(c).__name__ for c in callbacks]} failed: {error!r}")
        finally:
            monitors = [c for c in callbacks if isinstance(c, GradientMonitor)]
            turn_taker.incidents = sum(len(monitor.incidents) for monitor in monitors)
            turns.pass_on(index, leave=True)

    thread = threading.Thread(target=fit)
    thread.start()
    time.sleep(0.5)
    return thread, turn_taker


def ratio(times: list[float], baseline: list[float], block: int = BLOCK) -> Estimate:
    """Estimates the ratio of a step to the baseline's step, including work done once per block.

    Takes for each position in the block the median over the blocks, then the mean over the
    positions: outliers of single steps have no effect, a snapshot in every block counts. Excludes
    the warm-up blocks, in which memory is allocated. The interval is a bootstrap over the blocks
    (Efron 1979).

    >>> ratio([*[9.0] * 6, 1.0, 3.0, 1.0, 3.0, 8.0, 3.0], [1.0] * 12, block=2)
    Estimate(value=2.0, low=2.0, high=5.5)
    """
    ratios = in_blocks(times, block) / in_blocks(baseline, block)
    count = len(ratios)
    samples = ratios[np.random.default_rng(0).integers(count, size=(2000, count))]
    low, high = np.quantile(np.median(samples, axis=1).mean(axis=1), (0.025, 0.975))
    return Estimate(float(np.median(ratios, axis=0).mean()), float(low), float(high))


def in_blocks(steps: list[float], block: int = BLOCK) -> np.ndarray:
    """Reshapes the steps to ``(blocks, block)``, without warm-up and incomplete blocks.

    Raises:
        ValueError: No complete block remains.
    """
    kept = steps[WARMUP_BLOCKS * block : len(steps) - len(steps) % block]
    if not kept:
        raise ValueError(
            f"got {len(steps)} steps; need more than {WARMUP_BLOCKS} warm-up blocks of {block}"
        )
    return np.reshape(kept, (-1, block))
