"""Healthy runs of many kinds, among them those that a detector may mistake for a fault.

Imports Lightning and torch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.instabilities.cases import CASES, Case
from benchmarks.rescue.disturbances import InjectedFault
from benchmarks.rescue.networks import batches, images, sequences
from benchmarks.rescue.scenario import HEALTHY, Scenario
from benchmarks.rescue.tasks import TASKS, Task, loss_on
from lit_stability.faults import BadBatch

GPT, TRANSLATION, CAUSAL, CNN, GRU, GAN = TASKS.values()


def fp16() -> dict[str, Any]:
    """Returns Trainer options for fp16 with loss scaling on a CPU, where "16-mixed" is bf16."""
    scaler = torch.amp.GradScaler("cpu")
    return {"plugins": MixedPrecision("16-mixed", device="cpu", scaler=scaler)}


def from_case(case: Case, steps: int, batches: int = 10) -> Task:
    """Converts a case of `benchmarks.instabilities`; it is evaluated on its training data."""
    return Task(
        name=case.name,
        steps=steps,
        module=case.module,
        data=case.data,
        held_out=lambda module, seed: loss_on(module, islice(case.data(seed), batches)),
    )


class Unfreezing(BaseFinetuning):
    """Trains only the head in the first epoch, then all layers."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freezes the feature layers."""
        self.freeze(pl_module.net.features)

    def finetune_function(
        self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Unfreezes the feature layers in the second epoch."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.features, optimizer)


def _curriculum(seed: int) -> DataLoader[Any]:
    """Sequences sorted by the magnitude of their targets, one pass."""
    x, y = sequences(seed, n=360 * 16).tensors
    order = y.abs().mean(1).argsort()
    return DataLoader(TensorDataset(x[order], y[order]), 16)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def _one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return OneCycleLR(optimizer, 0.1, total_steps=CNN.steps + 1)


def _rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, 1e-3)


def _warm_restarts(optimizer: torch.optim.Optimizer) -> Any:
    return CosineAnnealingWarmRestarts(optimizer, T_0=60)


def _unfreezing() -> list[Callback]:
    return [Unfreezing()]


CNN_FP16 = replace(CNN.with_options("CNN, fp16 with a loss scale", rms=True), trainer=fp16)
GPT_FP16 = replace(GPT, name="byte GPT, fp16 with a loss scale", steps=120, trainer=fp16)
CNN_SGD = CNN.with_options("CNN, SGD with one-cycle", optimizer=_sgd, schedule=_one_cycle)
DIVERGES = CASES["learning rate diverges"]
POST_NORM = CASES["post-norm without warm-up"]
STALE = CASES["Adam's beta2 makes spikes"]
MLP_TWIN = from_case(DIVERGES.healthy(), 200)
POST_NORM_TWIN = from_case(POST_NORM.healthy(), 180, 4)
STALE_TWIN = from_case(STALE.healthy(), 1000)
PRE_NORM_TWIN = from_case(CASES["final gain zeroed"].healthy(), 120, 4)

_RUNS = (
    *(GPT, TRANSLATION, CAUSAL, CNN, GRU, GAN),
    *(CNN_FP16, GPT_FP16, CNN_SGD),
    *(MLP_TWIN, POST_NORM_TWIN, STALE_TWIN, PRE_NORM_TWIN),
    replace(GPT, name="byte GPT, bf16-mixed", trainer=lambda: {"precision": "bf16-mixed"}),
    replace(
        GPT,
        name="byte GPT, 4 batches accumulated",
        steps=60,
        trainer=lambda: {"accumulate_grad_batches": 4},
    ),
    GPT.with_options("byte GPT, dropout of 0.3", dropout=0.3),
    TRANSLATION.with_options(
        "translation, label smoothing and one-cycle", label_smoothing=0.1, schedule="onecycle"
    ),
    replace(CNN, name="CNN, batches of 2", data=lambda seed: batches(images(seed), seed, batch=2)),
    replace(CNN, name="CNN, unfreezing after an epoch", callbacks=_unfreezing),
    GRU.with_options("GRU, RMSprop", optimizer=_rmsprop),
    GRU.with_options("GRU, warm restarts", schedule=_warm_restarts),
    replace(GRU, name="GRU, curriculum", data=_curriculum),
    from_case(CASES["edge of stability"], 1000),
)

HEALTHY_RUNS: tuple[Scenario, ...] = (
    *(Scenario(name=task.name, family=HEALTHY, task=task) for task in _RUNS),
    Scenario(
        name="byte GPT, five batches of shuffled bytes",
        family=HEALTHY,
        task=GPT,
        disturbance=InjectedFault(lambda: BadBatch(step=120, steps=5)),
        step=120,
    ),
)
