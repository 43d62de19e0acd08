"""Putting another precision in force between two optimizer steps."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn

from lit_stability.measurement.half_precision import HALF, widen
from lit_stability.measurement.tensor_tree import tensors_in
from lit_stability.trainer_internals.strategies import sharing
from lit_stability.trainer_internals.trainer_view import callbacks_of
from lit_stability.training_state.fp32_modules import fp32_modules_of, keep_in_fp32


class PrecisionSwitch:
    """Changes a trainer's precision plugin, and back: each plugin returns as it was left.

    To be used at the end of a batch with which an optimizer step came: in the middle of an
    accumulation window gradients of one scale would be added to those of another.

    Args:
        trainer: whose plugin to change.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._plugins: dict[str, Precision] = {str(trainer.precision): trainer.precision_plugin}

    def put(self, precision: str) -> None:
        """Let everything from now on be computed in a precision.

        Half-precision weights and optimizer state become float32, never the other way.
        """
        half = is_half(self.trainer)
        self._use(precision)
        if half and not is_half(self.trainer):
            leave_half(self.trainer)

    def before_setup(self, precision: str, checkpoint: dict[str, Any]) -> None:
        """The same before the strategy has set its module up, so that nothing is rounded first.

        Args:
            precision: to put in force.
            checkpoint: whose weights the module was just given.
        """
        self._use(precision)
        tensors = _tensors_of(self.trainer.lightning_module)
        if not is_half(self.trainer) and any(t.dtype in HALF for t in tensors):
            widen(tensors)
            strict = self.trainer.lightning_module.strict_loading
            self.trainer.strategy.load_model_state_dict(checkpoint, strict=strict)

    def _use(self, precision: str) -> None:
        strategy = self.trainer.strategy
        if precision not in self._plugins:
            self._plugins[precision] = _plugin(precision, strategy.root_device.type)
        strategy.precision_plugin = self._plugins[precision]

    def scalers(self) -> dict[str, dict[str, Any]]:
        """States of the scalers, by precision, of plugins in force and put aside."""
        return {name: state for name, p in self._plugins.items() if (state := p.state_dict())}

    def load_scalers(self, states: dict[str, dict[str, Any]]) -> None:
        """Put them back, to plugins that were built anew."""
        for name, state in states.items():
            if name in self._plugins:
                self._plugins[name].load_state_dict(dict(state))


def is_half(trainer: Trainer) -> bool:
    """Whether the trainer keeps its weights in half precision."""
    return isinstance(trainer.precision_plugin, HalfPrecision)


def why_fixed(trainer: Trainer) -> str | None:
    """Why the precision of a fit cannot be changed, or None."""
    if type(trainer.strategy).__name__ == "FSDPStrategy":
        return "FSDP1 fixed the format of its shards when it made them; FSDP2 did not"
    if type(trainer.precision_plugin) not in (Precision, MixedPrecision, HalfPrecision):
        return f"{type(trainer.precision_plugin).__name__} converts the module in ways of its own"
    if is_half(trainer) and sharing(trainer) == "shards":
        return "FSDP2 made its shards of half-precision weights"
    return None


def is_supported(trainer: Trainer, precision: str) -> bool:
    """Whether the device computes in a precision."""
    on_cuda = trainer.strategy.root_device.type == "cuda"
    return "bf16" not in precision or not on_cuda or torch.cuda.is_bf16_supported()


def leave_half(trainer: Trainer) -> None:
    """Turn half-precision weights, buffers, moments and averages of weights into float32."""
    module = trainer.lightning_module
    averages = [
        tensor
        for callback in callbacks_of(trainer)
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
        for tensor in _tensors_of(callback._average_model)
    ]
    _widen(trainer, [*_tensors_of(module), *averages])


def apply_fp32_modules(trainer: Trainer, names: Iterable[str]) -> None:
    """Let modules compute in float32, their optimizer state included if it is half precision."""
    module, made = trainer.lightning_module, False
    for name in names:
        if name not in fp32_modules_of(module):
            keep_in_fp32(module.get_submodule(name))
            made = True
    if made and is_half(trainer):
        _widen(trainer, [])


def _widen(trainer: Trainer, tensors: Iterable[Tensor]) -> None:
    module = trainer.lightning_module
    module.zero_grad(set_to_none=True)
    widen(tensors)
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            if parameter.dtype not in HALF:
                widen(tensors_in(state))
    if sharing(trainer) == "replicas":
        _rewrap(trainer, module)


def _rewrap(trainer: Trainer, module: LightningModule) -> None:
    """Give DDP new buckets: those it has are of the old format, and ranks would drift apart."""
    strategy = cast(Any, trainer.strategy)
    strategy.model = module
    # The old wrapper takes its hooks off the parameters when it goes, and it is part of a cycle.
    gc.collect()
    strategy.model = strategy._setup_model(module)
    strategy._register_ddp_hooks()


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _plugin(precision: str, device: str) -> Precision:
    if precision == "32-true":
        return Precision()
    assert precision in ("16-mixed", "bf16-mixed"), "nothing falls back to half-precision weights"
    return MixedPrecision(cast(Literal["16-mixed", "bf16-mixed"], precision), device)
