"""The models of the scenarios, their data and their held-out loss.

Imports Lightning, torch and `models`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule
from benchmarks.byte_gpt import loader as bytes_of
from benchmarks.rescue.networks import (
    Cnn,
    Gan,
    Recurrent,
    Supervised,
    batches,
    images,
    normal,
    sequences,
)
from models.causal.datamodule import CausalDataModule
from models.causal.module import CausalModule
from models.translation.config import TransformerConfig
from models.translation.datamodule import TranslationDataModule
from models.translation.module import TranslationModule

HELD_OUT = 12345
"""Seed of the held-out data."""


def loss_on(module: LightningModule, data: Iterable[Any]) -> float:
    """Returns the mean loss of a trained module over batches, in eval mode and float32."""
    module.trainer = None
    module.eval()
    step: Any = type(module).training_step
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns that self.log has no Trainer
        losses = [float(step(module, batch, i)) for i, batch in enumerate(data)]
    return sum(losses) / len(losses)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and its training; healthy unless its name states a fault."""

    name: str
    steps: int
    """Optimizer steps of a run, summed over all optimizers."""
    module: Callable[..., LightningModule]
    """Creates the module after the seed was set; takes options by keyword."""
    data: Callable[[int], DataLoader[Any]]
    """Creates the training data from the seed."""
    held_out: Callable[[LightningModule, int], float]
    """Returns the held-out loss of a trained module, given the seed of the run."""
    trainer: Callable[[], dict[str, Any]] = dict
    """Creates further arguments of the Trainer for each run."""
    callbacks: Callable[[], list[Callback]] = list
    """Creates further callbacks for each run."""

    def with_options(self, name: str, **options: Any) -> Task:
        """Returns a copy with other options of the module."""
        create = self.module
        return replace(self, name=name, module=lambda: create(**options))


def _byte_gpt(*, dropout: float = 0.0, **options: Any) -> ByteGPTModule:
    config = ByteGPTConfig(width=48, layers=2, length=32, dropout=dropout)
    return ByteGPTModule(config, **({"lr": 3e-3} | options))


@functools.cache
def _pairs(seed: int) -> TranslationDataModule:
    data = TranslationDataModule(batch_size=16, n_train=2000, n_val=200, n_test=1, seed=seed)
    data.setup()
    return data


def _translation(**options: Any) -> TranslationModule:
    network = TransformerConfig(
        d_model=48,
        n_encoder_layers=1,
        n_decoder_layers=1,
        d_feedforward=96,
        dropout=0.0,
        max_length=32,
        attention="manual",
    )
    module = TranslationModule(
        network=network, **({"lr": 3e-3, "warmup_steps": 30, "schedule": "warmup_cosine"} | options)
    )
    module.build(_pairs(0).vocabulary)
    return module


@functools.cache
def _sentences(seed: int) -> CausalDataModule:
    data = CausalDataModule(batch_size=8, n_train=1000, n_val=200, n_test=1, seed=seed)
    data.setup()
    return data


def _causal(**options: Any) -> CausalModule:
    module = CausalModule(**({"lr": 1e-2} | options))
    module.build()
    return module


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 3e-3)


def _cnn(*, rms: bool = False, **options: Any) -> Supervised:
    return Supervised(Cnn(rms=rms), **({"loss": F.cross_entropy, "optimizer": _adamw} | options))


def _gru(**options: Any) -> Supervised:
    return Supervised(Recurrent(), **({"loss": F.mse_loss, "optimizer": _adamw} | options))


def _quantiles(module: LightningModule, seed: int) -> float:
    """Returns the mean distance between the quantiles of generated and of real samples."""
    g = torch.Generator().manual_seed(HELD_OUT)
    with torch.no_grad():
        generated: Tensor = module.generator(torch.randn(2048, 2, generator=g))
    real = normal(HELD_OUT).tensors[0]
    return float((generated.flatten().sort()[0] - real.flatten().sort()[0]).abs().mean())


def _on(data: Callable[[], Iterable[Any]]) -> Callable[[LightningModule, int], float]:
    return lambda module, seed: loss_on(module, data())


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="byte GPT",
            steps=240,
            module=_byte_gpt,
            data=lambda seed: bytes_of(8, 32, seed),
            held_out=_on(lambda: islice(bytes_of(32, 32, HELD_OUT), 10)),
        ),
        Task(
            name="translation",
            steps=240,
            module=_translation,
            data=lambda seed: _pairs(0).train_dataloader(),
            held_out=_on(lambda: _pairs(0).val_dataloader()),
        ),
        Task(
            name="causal",
            steps=160,
            module=_causal,
            data=lambda seed: _sentences(0).train_dataloader(),
            held_out=_on(lambda: _sentences(0).val_dataloader()),
        ),
        Task(
            name="CNN",
            steps=360,
            module=_cnn,
            data=lambda seed: batches(images(seed), seed),
            held_out=_on(lambda: DataLoader(images(HELD_OUT), 256)),
        ),
        Task(
            name="GRU",
            steps=360,
            module=_gru,
            data=lambda seed: batches(sequences(seed), seed),
            held_out=_on(lambda: DataLoader(sequences(HELD_OUT), 256)),
        ),
        Task(
            name="GAN",
            steps=960,
            module=lambda: Gan(),
            data=lambda seed: batches(normal(seed), seed, 32),
            held_out=_quantiles,
        ),
    )
}
