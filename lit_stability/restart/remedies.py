"""What is changed for the next fit after a crash, by its kind.

    out of memory ... half the micro-batch and twice the accumulation; where that cannot be,
                      activation checkpointing
    instability ..... learning rate and clip halved; then a new optimizer state too; then fp32 too
    data ............ the batch that cannot be fetched is left out
    other ........... nothing: a plain restart, but not twice for the same error at the same step

May import Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.parsing import (
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
)

from lit_stability.callbacks.hooks import implements
from lit_stability.restart.crashes import Crash
from lit_stability.restart.memory import batch_sizes, checkpoint_activations, drops_last
from lit_stability.trainer_internals import callbacks_of

CUT = 0.5
"""What learning rate and clip are multiplied by for each instability in a row."""

_COUNTED_IN_BATCHES = ("limit_train_batches", "overfit_batches", "val_check_interval")


class GiveUp(Exception):
    """No remedy is left; the message says why, and what to add."""


@dataclass
class Plan:
    """What the next fit does differently from the first; it only grows, but for a streak's end."""

    loaders_given: bool = False
    """Whether the loaders were handed over ready-made, which no attribute can change."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Options for ``make_trainer``."""
    accumulation: int = 1
    """Micro-batches of an optimizer step in the first fit."""
    batch_sizes: list[int | None] = field(default_factory=list)
    """What the training loaders' batch sizes must be, after one was halved."""
    parts: int = 1
    """Into how many each micro-batch of the first fit is cut."""
    checkpoints_activations: bool = False
    unwanted: list[frozenset[Any]] = field(default_factory=list)
    """Samples of each batch that is left out."""
    instabilities: int = 0
    """In the present streak of crashes."""
    seen: set[tuple[str, str, int]] = field(default_factory=set)
    """Crashes of no known kind that a plain restart was tried for."""

    @property
    def cut(self) -> float:
        """What learning rate and clip are multiplied by at the start of the next fit."""
        return CUT**self.instabilities

    @property
    def forgets_moments(self) -> bool:
        """Whether the optimizers begin anew."""
        return self.instabilities > 1

    def made_progress(self) -> None:
        """Take back what was meant to get past a place that is now passed."""
        self.instabilities = 0
        self.overrides.pop("gradient_clip_val", None)

    def choose(self, crash: Crash, trainer: Trainer, module: LightningModule) -> str:
        """Decide what the next fit does differently; returns it in words.

        Args:
            crash: what happened.
            trainer: that it happened in, still attached to the module.
            module: in training.

        Raises:
            GiveUp: if nothing is left to be tried.
        """
        match crash.kind:
            case "out of memory":
                return self._smaller(trainer, module)
            case "instability":
                return self._calmer(trainer)
            case "data" if crash.samples:
                self.unwanted.append(frozenset(crash.samples))
                return (
                    f"batch {crash.batch_idx} of epoch {crash.epoch} is left out, samples "
                    f"{_shortened(crash.samples)}"
                )
            case "device":
                raise GiveUp(
                    "the device is lost to this process: start a new one, and resume from the "
                    "last good checkpoint"
                )
            case _:
                return self._again(crash)

    def adopt(self, parts: int, trainer: Trainer, module: LightningModule) -> str:
        """Cut batches as those of the checkpoint had been; returns it in words.

        Args:
            parts: into how many they were.
            trainer: of the first fit, attached to the module.
            module: in training.

        Raises:
            GiveUp: if they cannot be cut.
        """
        words = []
        while self.parts < parts:
            obstacle = self._obstacle(trainer, module)
            if obstacle is not None:
                raise GiveUp(
                    f"the checkpoint counts in batches cut into {parts}, and {obstacle}: resume "
                    "with the batch_size and accumulate_grad_batches that it was written with"
                )
            words.append(self._halve(trainer, module))
        return ", ".join(words)

    def _smaller(self, trainer: Trainer, module: LightningModule) -> str:
        obstacle = self._obstacle(trainer, module)
        if obstacle is None:
            return self._halve(trainer, module)
        if not self.checkpoints_activations and checkpoint_activations(module):
            self.checkpoints_activations = True
            return f"activation checkpointing ({obstacle})"
        raise GiveUp(
            f"memory is too small, and nothing is left to save it with: {obstacle}; "
            + (
                "activations are checkpointed already"
                if self.checkpoints_activations
                else f"{type(module).__name__} offers no activation checkpointing: give it a "
                "method enable_activation_checkpointing()"
            )
        )

    def _obstacle(self, trainer: Trainer, module: LightningModule) -> str | None:
        """Why the micro-batch cannot be halved, or None."""
        if not module.automatic_optimization:
            return "manual optimization cannot accumulate gradients"
        if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks_of(trainer)):
            return "a GradientAccumulationScheduler sets the accumulation"
        if self.loaders_given:
            return (
                "the batch size of loaders that are handed over cannot be halved: define "
                "train_dataloader() with self.batch_size, in the module or a data module"
            )
        if not lightning_hasattr(module, "batch_size"):
            return (
                "neither module nor data module has a batch_size attribute: give one of them the "
                "one that train_dataloader() reads"
            )
        size = lightning_getattr(module, "batch_size")
        if type(size) is not int or size < 2 or size % 2:
            return f"batch_size={size!r} cannot be halved"
        return None

    def _halve(self, trainer: Trainer, module: LightningModule) -> str:
        size = lightning_getattr(module, "batch_size")
        assert isinstance(size, int)
        lightning_setattr(module, "batch_size", size // 2)
        accumulation = self.accumulation * self.parts
        self.parts *= 2
        self.batch_sizes = [
            None if each is None or each % 2 else each // 2 for each in batch_sizes(trainer)
        ]
        self.overrides["accumulate_grad_batches"] = 2 * accumulation
        for name in _COUNTED_IN_BATCHES:
            value = getattr(trainer, name)
            if type(value) is int and value:
                self.overrides[name] = 2 * value
        if trainer.limit_train_batches == 1.0 and drops_last(trainer):
            # Or the epoch would gain a half batch that a whole one had no samples for.
            self.overrides["limit_train_batches"] = 2 * int(trainer.num_training_batches)
        return (
            f"batch_size {size} -> {size // 2}, accumulate_grad_batches "
            f"{accumulation} -> {2 * accumulation}"
        )

    def _calmer(self, trainer: Trainer) -> str:
        self.instabilities += 1
        clip = getattr(trainer, "gradient_clip_val", None)
        words = f"learning rate x{self.cut:g}"
        if any(implements(each, "lower_learning_rate") for each in callbacks_of(trainer)):
            words += f", clip x{self.cut:g}"
        elif clip:
            self.overrides["gradient_clip_val"] = clip * CUT
            words += f", gradient_clip_val {clip:g} -> {clip * CUT:g}"
        if self.forgets_moments:
            words += ", new optimizer state"
        if self.instabilities > 2 and "16" in str(trainer.precision):
            self.overrides["precision"] = "32-true"
            words += f", precision {trainer.precision} -> 32-true"
        return words

    def _again(self, crash: Crash) -> str:
        if crash.identity in self.seen:
            raise GiveUp(
                "it came back in the same place of the code at the same step: it is "
                "deterministic, and another restart would not help" + _hint_for_data(crash)
            )
        self.seen.add(crash.identity)
        return "plain restart"


def _hint_for_data(crash: Crash) -> str:
    if crash.kind != "data":
        return ""
    return (
        "; which samples the batch has is known only for one map-style DataLoader: catch the "
        "error where the data are read"
    )


def _shortened(samples: tuple[Any, ...]) -> str:
    """Indices in a few words.

    >>> _shortened((4, 5, 6, 7)), _shortened((9, 3)), _shortened((8,))
    ('4 to 7', '9, 3', '8')
    """
    numbers = all(type(s) is int for s in samples)
    if numbers and len(samples) > 2 and samples == tuple(range(samples[0], samples[-1] + 1)):
        return f"{samples[0]} to {samples[-1]}"
    return ", ".join(map(str, samples))
