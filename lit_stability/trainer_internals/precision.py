"""Changes the precision of a fit between two optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lit_stability.lightning_package import (
    HalfPrecision,
    MixedPrecision,
    Precision,
    Trainer,
    WeightAveraging,
)
from lit_stability.measurement.half_precision import HALF, widen
from lit_stability.measurement.tensor_tree import tensors_in
from lit_stability.trainer_internals.strategies import adapter_of
from lit_stability.trainer_internals.trainer_view import callbacks_of
from lit_stability.training_state.fp32_modules import fp32_modules_of, keep_in_fp32


class PrecisionSwitch:
    """Changes the precision plugin of a trainer; the state of each plugin is kept while unused.

    Change it only at the end of a batch with an optimizer step. Inside an accumulation window,
    gradients with different loss scales would be added.

    Args:
        trainer: owner of the plugin.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._plugins: dict[str, Precision] = {str(trainer.precision): trainer.precision_plugin}

    def put(self, precision: str) -> None:
        """Changes the precision from now on.

        Half-precision weights and optimizer state are converted to float32; float32 is never
        converted to half precision.
        """
        half = is_half(self.trainer)
        self._use(precision)
        if half and not is_half(self.trainer):
            leave_half(self.trainer)

    def before_setup(self, precision: str, checkpoint: dict[str, Any]) -> None:
        """Changes the precision before the strategy sets up the module, so that nothing is rounded.

        Args:
            precision: the new precision.
            checkpoint: its weights are loaded again if the module holds rounded ones.
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
        """Returns the states of the scalers of all plugins, by precision."""
        return {name: state for name, p in self._plugins.items() if (state := p.state_dict())}

    def load_scalers(self, states: dict[str, dict[str, Any]]) -> None:
        """Restores the states of the scalers."""
        for name, state in states.items():
            if name in self._plugins:
                self._plugins[name].load_state_dict(dict(state))


def is_half(trainer: Trainer) -> bool:
    """Returns whether the weights are stored in half precision."""
    return isinstance(trainer.precision_plugin, HalfPrecision)


def why_fixed(trainer: Trainer) -> str | None:
    """Returns why the precision of a fit cannot be changed, or None."""
    adapter = adapter_of(trainer)
    if (reason := adapter.why_precision_fixed) is not None:
        return reason
    if type(trainer.precision_plugin) not in (Precision, MixedPrecision, HalfPrecision):
        return f"{type(trainer.precision_plugin).__name__} converts the module itself"
    return adapter.why_half_fixed if is_half(trainer) else None


def is_supported(trainer: Trainer, precision: str) -> bool:
    """Returns whether the device supports a precision."""
    on_cuda = trainer.strategy.root_device.type == "cuda"
    return "bf16" not in precision or not on_cuda or torch.cuda.is_bf16_supported()


def leave_half(trainer: Trainer) -> None:
    """Converts half-precision weights, buffers, optimizer state and averages to float32."""
    module = trainer.lightning_module
    averages = [
        tensor
        for callback in callbacks_of(trainer)
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
        for tensor in _tensors_of(callback._average_model)
    ]
    _widen(trainer, [*_tensors_of(module), *averages])


def apply_fp32_modules(trainer: Trainer, names: Iterable[str]) -> None:
    """Keeps modules in float32, and converts their optimizer state if it is half precision."""
    module, changed = trainer.lightning_module, False
    for name in names:
        if name not in fp32_modules_of(module):
            keep_in_fp32(module.get_submodule(name))
            changed = True
    if changed and is_half(trainer):
        _widen(trainer, [])


def _widen(trainer: Trainer, tensors: Iterable[Tensor]) -> None:
    module = trainer.lightning_module
    module.zero_grad(set_to_none=True)
    widen(tensors)
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            if parameter.dtype not in HALF:
                widen(tensors_in(state))
    adapter_of(trainer).module_converted()


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _plugin(precision: str, device: str) -> Precision:
    if precision == "32-true":
        return Precision()
    assert precision in ("16-mixed", "bf16-mixed"), "no fallback uses half-precision weights"
    return MixedPrecision(cast(Literal["16-mixed", "bf16-mixed"], precision), device)
