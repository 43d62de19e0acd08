"""Chooses what the next fit changes after a crash, by the kind of crash.

    out of memory ... half the micro-batch and twice the accumulation; if that is impossible,
                      activation checkpointing
    instability ..... halved learning rate and clip; then also new optimizer state; then also fp32
    data ............ skip the batch that cannot be fetched
    other ........... plain restart without a change, but only once per error and step

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lit_stability.callbacks.hooks import can_lower_learning_rate
from lit_stability.lightning_package import (
    GradientAccumulationScheduler,
    LightningModule,
    Trainer,
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
)
from lit_stability.restart.crashes import Crash
from lit_stability.restart.memory import batch_sizes, checkpoint_activations, drops_last
from lit_stability.restart.rank_records import hashable
from lit_stability.trainer_internals import callbacks_of

CUT = 0.5
"""Factor on learning rate and clip for each consecutive instability."""

_COUNTED_IN_BATCHES = ("limit_train_batches", "overfit_batches", "val_check_interval")


class GiveUp(Exception):
    """Raised if no remedy is left; the message says why, and what to add."""


@dataclass
class Plan:
    """What the next fit does differently from the first.

    Changes accumulate; only the changes for instability are reset after progress.
    """

    loaders_given: bool = False
    """Whether the user passed loaders to the fit, whose batch size cannot be changed."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Options for ``make_trainer``."""
    accumulation: int = 1
    """Micro-batches per optimizer step in the first fit."""
    batch_sizes: list[int | None] = field(default_factory=list)
    """Batch sizes that the training loaders must have after ``batch_size`` was halved."""
    parts: int = 1
    """Number of parts that each micro-batch of the first fit is split into."""
    checkpoints_activations: bool = False
    unwanted: list[frozenset[Any]] = field(default_factory=list)
    """Samples of each skipped batch."""
    instabilities: int = 0
    """Number of instabilities in the current series of consecutive crashes."""
    seen: set[tuple[str, str, int]] = field(default_factory=set)
    """Identities of crashes of no known kind that were restarted without a change."""

    @property
    def cut(self) -> float:
        """Returns the factor on learning rate and clip at the start of the next fit."""
        return CUT**self.instabilities

    @property
    def clears_optimizer_state(self) -> bool:
        """Returns whether the optimizer state is reset."""
        return self.instabilities > 1

    def to_plain(self) -> dict[str, Any]:
        """Returns the plan as types that JSON has."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        found["unwanted"] = [sorted(samples, key=repr) for samples in self.unwanted]
        found["seen"] = sorted(map(list, self.seen))
        return found

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> Plan:
        """Returns a plan from what `to_plain` returned."""
        unwanted = [frozenset(map(hashable, samples)) for samples in found["unwanted"]]
        seen = {(error, place, step) for error, place, step in found["seen"]}
        return cls(**{**found, "unwanted": unwanted, "seen": seen})

    def made_progress(self) -> None:
        """Resets the changes for instability after training got past the crash."""
        self.instabilities = 0
        self.overrides.pop("gradient_clip_val", None)

    def choose(
        self, crash: Crash, trainer: Trainer, module: LightningModule, *, new_process: bool = False
    ) -> str:
        """Chooses what the next fit does differently.

        Args:
            crash: the crash.
            trainer: the trainer that crashed, still attached to the module.
            module: the module in training.
            new_process: whether the next fit is in another process.

        Returns:
            A description of the change.

        Raises:
            GiveUp: if no remedy is left.
        """
        match crash.kind:
            case "out of memory":
                return self._reduce_memory(trainer, module)
            case "instability":
                return self._stabilize(trainer)
            case "data" if crash.samples:
                self.unwanted.append(frozenset(crash.samples))
                return (
                    f"batch {crash.batch_idx} of epoch {crash.epoch} is skipped, samples "
                    f"{_shortened(crash.samples)}"
                )
            case "device" if not new_process:
                raise GiveUp(
                    "this process cannot use the device any more: start a new process and resume "
                    "from the last good checkpoint"
                )
            case _:
                return self._plain_restart(crash)

    def adopt(self, parts: int, trainer: Trainer, module: LightningModule) -> str:
        """Splits batches into as many parts as the fit that wrote the checkpoint did.

        Args:
            parts: number of parts in the checkpoint.
            trainer: the trainer of the first fit, attached to the module.
            module: the module in training.

        Returns:
            A description of the change.

        Raises:
            GiveUp: if the batches cannot be split.
        """
        changes = []
        while self.parts < parts:
            obstacle = self._obstacle(trainer, module)
            if obstacle is not None:
                raise GiveUp(
                    f"the checkpoint counts micro-batches split into {parts}, and {obstacle}: "
                    "resume with the batch_size and accumulate_grad_batches of that fit"
                )
            changes.append(self._halve(trainer, module))
        return ", ".join(changes)

    def _reduce_memory(self, trainer: Trainer, module: LightningModule) -> str:
        obstacle = self._obstacle(trainer, module)
        if obstacle is None:
            return self._halve(trainer, module)
        if not self.checkpoints_activations and checkpoint_activations(module):
            self.checkpoints_activations = True
            return f"activation checkpointing ({obstacle})"
        raise GiveUp(
            f"out of memory, and no way to save memory is left: {obstacle}; "
            + (
                "activation checkpointing is enabled already"
                if self.checkpoints_activations
                else f"{type(module).__name__} has no activation checkpointing: define a method "
                "enable_activation_checkpointing()"
            )
        )

    def _obstacle(self, trainer: Trainer, module: LightningModule) -> str | None:
        """Returns why the micro-batch cannot be halved, or None."""
        if not module.automatic_optimization:
            return "manual optimization cannot accumulate gradients"
        if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks_of(trainer)):
            return "a GradientAccumulationScheduler sets the accumulation"
        if self.loaders_given:
            return (
                "the batch size of loaders passed to fit cannot be halved: define "
                "train_dataloader() with self.batch_size, in the module or a data module"
            )
        if not lightning_hasattr(module, "batch_size"):
            return (
                "neither module nor data module has a batch_size attribute: add one, and use it "
                "in train_dataloader()"
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
            None if old is None or old % 2 else old // 2 for old in batch_sizes(trainer)
        ]
        self.overrides["accumulate_grad_batches"] = 2 * accumulation
        for name in _COUNTED_IN_BATCHES:
            value = getattr(trainer, name)
            if type(value) is int and value:
                self.overrides[name] = 2 * value
        if trainer.limit_train_batches == 1.0 and drops_last(trainer):
            # Otherwise the epoch could gain a half batch from samples that filled no whole one.
            self.overrides["limit_train_batches"] = 2 * int(trainer.num_training_batches)
        return (
            f"batch_size {size} -> {size // 2}, accumulate_grad_batches "
            f"{accumulation} -> {2 * accumulation}"
        )

    def _stabilize(self, trainer: Trainer) -> str:
        self.instabilities += 1
        clip = getattr(trainer, "gradient_clip_val", None)
        change = f"learning rate x{self.cut:g}"
        if can_lower_learning_rate(trainer):
            change += f", clip x{self.cut:g}"
        elif clip:
            self.overrides["gradient_clip_val"] = clip * CUT
            change += f", gradient_clip_val {clip:g} -> {clip * CUT:g}"
        if self.clears_optimizer_state:
            change += ", new optimizer state"
        if self.instabilities > 2 and "16" in str(trainer.precision):
            self.overrides["precision"] = "32-true"
            change += f", precision {trainer.precision} -> 32-true"
        return change

    def _plain_restart(self, crash: Crash) -> str:
        if crash.identity in self.seen:
            raise GiveUp(
                "the error recurred at the same line of code and the same step: it is "
                "deterministic, and another restart would not help" + _hint_for_data(crash)
            )
        self.seen.add(crash.identity)
        return "plain restart"


def _hint_for_data(crash: Crash) -> str:
    if crash.kind != "data":
        return ""
    return (
        "; the samples of the batch are known only for a single map-style DataLoader: catch the "
        "error where the data are read"
    )


def _shortened(samples: tuple[Any, ...]) -> str:
    """Returns sample indices as short text.

    >>> _shortened((4, 5, 6, 7)), _shortened((9, 3)), _shortened((8,))
    ('4 to 7', '9, 3', '8')
    """
    numbers = all(type(s) is int for s in samples)
    if numbers and len(samples) > 2 and samples == tuple(range(samples[0], samples[-1] + 1)):
        return f"{samples[0]} to {samples[-1]}"
    return ", ".join(map(str, samples))
