"""Trains a kind once, bare or with the suite, and keeps what the run ended with.

Imports Lightning and torch.
"""

from __future__ import annotations

import hashlib
import logging
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.healthy.kind import Kind
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor, Incident, TrainingStopped, stability_callbacks

LOGGER = logging.getLogger("lightning.pytorch.lit_stability")
Ending = Literal["finished", "stopped", "crashed"]
"""``stopped``: by the suite, on purpose. ``crashed``: by any other error."""


@dataclass
class Run:
    """A finished run, and all in which two runs are compared."""

    ended: Ending = "finished"
    message: str = ""
    """Error or reason, if the run did not finish."""
    steps: int = 0
    """``global_step`` at the end."""
    values: list[float] = field(default_factory=list)
    """What `Net.track` recorded."""
    parts: dict[str, str] = field(default_factory=dict)
    """Digests of weights, buffers, optimizer state and so on; equal if bit-identical."""
    incidents: list[Incident] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Warnings that the suite logged, those about incidents included."""
    seconds: float = 0.0
    """Wall-clock time of the fits."""

    @property
    def responses(self) -> list[str]:
        """All responses of the suite, in order."""
        return [response for incident in self.incidents for response in incident.responses]


class MetricRecorder(Callback):
    """Records the logged metrics when each ``global_step`` is first reached.

    A step that the suite rejects reaches no new ``global_step`` and is not recorded; one that is
    run again replaces its first record.
    """

    def __init__(self) -> None:
        self.metrics: dict[Any, dict[str, Any]] = {}
        self._last = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Records the metrics of a step."""
        if trainer.global_step > self._last:
            self.metrics[trainer.global_step] = dict(trainer.callback_metrics)
        self._last = trainer.global_step

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        """Records the metrics of a validation."""
        self.metrics["validation", trainer.global_step] = dict(trainer.callback_metrics)


def run(kind: Kind, seed: int, with_suite: bool, beside: Sequence[Callback] = ()) -> Run:
    """Trains a kind with a seed.

    Args:
        kind: To train.
        seed: Of the weights, the data and everything drawn in training.
        with_suite: Adds ``stability_callbacks()``, after the callbacks of the kind.
        beside: Callbacks to add to the suite.
    """
    result = Run()
    seed_everything(seed, verbose=False)
    module, recorder = kind.module(), MetricRecorder()
    own, suite = kind.callbacks(), [*stability_callbacks(), *beside] if with_suite else []
    with tempfile.TemporaryDirectory() as folder, _recorded_warnings(result):
        for fold in range(kind.fits):
            trainer = _trainer(kind, [*own, *suite, recorder], folder)
            _fit(trainer, kind, module, seed + fold, result)
            # A monitor may start a new list of incidents in each fit.
            result.incidents += _new_incidents(suite, result.incidents)
            if result.ended != "finished":
                break
    result.steps, result.values = trainer.global_step, module.values
    result.parts = _parts(trainer, module, own, recorder)
    return result


def _trainer(kind: Kind, callbacks: list[Callback], folder: str) -> Trainer:
    options = {"max_steps": kind.steps, "callbacks": callbacks, "default_root_dir": folder}
    validation = {"limit_val_batches": 0} if kind.held_out is None else {}
    return quiet_trainer(**(options | validation | {"num_sanity_val_steps": 0} | kind.trainer()))


def _fit(trainer: Trainer, kind: Kind, module: LightningModule, seed: int, result: Run) -> None:
    """Trains; an exception is one of the ways to end."""
    held_out = None if kind.held_out is None else kind.held_out(seed)
    data, start = kind.data(seed), time.perf_counter()
    try:
        trainer.fit(module, data, held_out)
    except TrainingStopped as stop:
        result.ended, result.message = "stopped", str(stop)
    # A practice that the suite cannot handle may fail in any way.
    except Exception as error:
        result.ended, result.message = "crashed", f"{type(error).__name__}: {error}"
    result.seconds += time.perf_counter() - start


def _new_incidents(suite: list[Callback], known: list[Incident]) -> list[Incident]:
    found = [i for c in suite if isinstance(c, GradientMonitor) for i in c.incidents]
    return [incident for incident in found if not any(incident is k for k in known)]


@contextmanager
def _recorded_warnings(result: Run) -> Iterator[None]:
    """Records the warnings of the suite, which go no further."""

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            result.warnings.append(record.getMessage())

    recorder, before = Recorder(), (LOGGER.level, LOGGER.propagate)
    LOGGER.addHandler(recorder)
    LOGGER.setLevel(logging.WARNING)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(recorder)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]


def _parts(
    trainer: Trainer, module: LightningModule, own: list[Callback], recorder: MetricRecorder
) -> dict[str, str]:
    """Returns the digests of what a run ends with, by the names that the table uses."""
    parts = {
        "weights": dict(module.named_parameters()),
        "buffers": dict(module.named_buffers()),
        "trainable": [p.requires_grad for p in module.parameters()],
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "schedule": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "generators": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
        "global_step": trainer.global_step,
        "metrics": [recorder.metrics, dict(trainer.callback_metrics)],
        "callbacks": [callback.state_dict() for callback in own],
        "precision": trainer.precision_plugin.state_dict(),
    }
    return {name: digest(part, trainer.default_root_dir) for name, part in parts.items()}


def digest(value: Any, omit: str = "") -> str:
    """Returns a digest that is equal for two nested values with the same bits.

    Args:
        value: Tensors, arrays and numbers, in mappings and sequences.
        omit: Text that is left out, such as the path of a temporary folder.

    >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(2)})
    True
    >>> digest([torch.zeros(2)]) == digest([torch.tensor([0.0, -0.0])])
    False
    """
    state = hashlib.sha256()
    for piece in _pieces(value):
        state.update(piece.replace(omit.encode(), b"") if omit else piece)
    return state.hexdigest()[:16]


def _pieces(value: Any) -> Iterator[bytes]:
    """Yields the bytes of a nested value, with types and lengths."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    else:
        # Functions in the state of a scheduler have no equal text in two runs.
        yield b"function" if callable(value) else repr(value).encode()
