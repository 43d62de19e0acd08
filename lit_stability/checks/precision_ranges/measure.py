"""Measures the magnitudes of a model: its weights, and its activations and gradients over batches.

The model runs in float32, whatever its own dtype, because fp16 turns overflowing values into Inf
and vanishing ones into zero, so that their size is unknown. May import torch; does not import
Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_stability.checks.precision_ranges.report import INPUT, KINDS, LOSS, ROOT, Kind, RangeReport
from lit_stability.checks.precision_ranges.tally import Tally
from lit_stability.measurement.tensor_tree import tensors_in
from lit_stability.training_state.rng import capture_rng, restore_rng

_PRODUCTS = frozenset(
    (
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, F.linear),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
        *(Tensor.addmm, Tensor.baddbmm),
    )
)
"""Functions that autocast runs in 16 bits, and that models call outside of submodules."""


def measure_ranges(
    model: nn.Module,
    step: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    adam_epsilon: float = 1e-8,
) -> RangeReport:
    """Measures weights, activations and gradients over some batches, without an update.

    The steps run on a float32 copy of the model in training mode. The model itself, its gradients,
    buffers and mode, and the random generators stay unchanged.

    Args:
        model: On the device of the batches.
        step: Computes the loss, a scalar, from the copy and a batch; it must call the copy that it
            receives. Gradients are those of this loss, without a loss scale.
        batches: Passed to `step` one at a time; floating-point tensors in float32.
        adam_epsilon: Epsilon of the optimizer that trains the model.

    Raises:
        ValueError: If there is no batch, a loss is no scalar, or a loss gives no gradients.

    >>> model = nn.Linear(2, 1)
    >>> report = measure_ranges(model, lambda m, x: m(x).sum(), [torch.ones(3, 2)])
    >>> report.row("weight gradients", "(model)").largest
    3.0
    """
    model_copy = deepcopy(model).float().train()  # without gradients
    generators = capture_rng()
    probe = Probe(model_copy)
    try:
        with probe, torch.enable_grad():
            for batch in batches:
                _take_step(probe, model_copy, step, batch)
    finally:
        restore_rng(generators)
    if not probe.batches:
        raise ValueError("batches is empty; give at least one, or several if they differ")
    return probe.report(adam_epsilon)


def _take_step(
    probe: Probe, model_copy: nn.Module, step: Callable[[nn.Module, Any], Tensor], batch: Any
) -> None:
    probe.add_batch(batch)
    loss = step(model_copy, batch)
    if not (isinstance(loss, Tensor) and loss.numel() == 1):
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ValueError(f"step returned {shape}; return the loss, a tensor with one element")
    probe.add_loss(loss)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    if all(p.grad is None for p in model_copy.parameters()):
        raise ValueError(
            "the loss gives the model no gradient: step(model, batch) has to call the model that "
            "it receives, a float32 copy, and return a loss that is not detached"
        )
    probe.add_gradients()
    model_copy.zero_grad()


class Probe:
    """Measures a model during training, while the context is active.

    Activations are the outputs of submodules, each counted once even if an outer module returns the
    same tensor, and the matrix products that a module computes without a submodule, such as
    attention scores. Values inside a fused kernel, such as `scaled_dot_product_attention`, are not
    visible. A module has the weights and gradients of its own parameters; a shared parameter
    belongs to the first module.

    Args:
        model: In float32; its parameters must not be replaced while the context is active.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tallies: dict[tuple[Kind, str], Tally] = {}
        self._attached = ExitStack()
        self._running: list[str] = []
        self._last: list[Tensor] = []
        self._owners: list[tuple[str, nn.Parameter]] = []
        self._order: list[str] = []
        self.batches = 0
        """Number of batches measured so far."""

    def __enter__(self) -> Probe:
        """Measures the weights, and registers the hooks."""
        self._order = [INPUT, *(name or ROOT for name, _ in self._model.named_modules()), LOSS]
        self._owners = _owned(self._model)
        for layer, parameter in self._owners:
            self._count("weights", layer, parameter)
        for name, module in self._model.named_modules():
            before, after = partial(self._before, name or ROOT), partial(self._after, name or ROOT)
            self._attached.callback(module.register_forward_pre_hook(before).remove)
            handle = module.register_forward_hook(after, always_call=True)
            self._attached.callback(handle.remove)
        self._attached.enter_context(_Products(self._add_product))
        return self

    def __exit__(self, *error: object) -> None:
        """Removes all hooks."""
        self._attached.close()
        self._last = []

    def add_batch(self, batch: Any) -> None:
        """Counts the floating-point tensors of a batch."""
        self.batches += 1
        self._running = []
        for tensor in _floating(batch):
            self._count("activations", INPUT, tensor)

    def add_loss(self, loss: Tensor) -> None:
        """Counts the loss, before any scaling."""
        self._count("activations", LOSS, loss)

    def add_gradients(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Counts the weight gradients of one batch.

        Args:
            parameters: The parameters to count; all by default.
        """
        selected = None if parameters is None else {id(p) for p in parameters}
        for layer, parameter in self._owners:
            if parameter.grad is not None and (selected is None or id(parameter) in selected):
                self._count("weight gradients", layer, parameter.grad)

    def report(self, adam_epsilon: float = 1e-8) -> RangeReport:
        """Returns the measurements so far, in the order of the model."""
        position = {name: i for i, name in enumerate(self._order)}
        keys = sorted(self._tallies, key=lambda key: (KINDS.index(key[0]), position[key[1]]))
        rows = tuple(self._tallies[key].row(*key) for key in keys)
        measured = {row.layer for row in rows}
        layers = tuple(name for name in self._order if name in measured)
        return RangeReport(rows, layers, self.batches, adam_epsilon)

    def _before(self, layer: str, module: nn.Module, args: Any) -> None:
        self._running.append(layer)

    def _after(self, layer: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()
        self._add_activations(layer, output)

    def _add_product(self, result: Any) -> None:
        self._add_activations(self._running[-1] if self._running else ROOT, result)

    def _add_activations(self, layer: str, output: Any) -> None:
        tensors = _floating(output)
        for tensor in tensors:
            if any(tensor is last for last in self._last):  # an outer module returns it unchanged
                continue
            self._count("activations", layer, tensor)
            if tensor.requires_grad:
                hook = partial(self._count, "activation gradients", layer)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        self._last = tensors

    def _count(self, kind: Kind, layer: str, tensor: Tensor) -> None:
        if tensor.numel():
            self._tallies.setdefault((kind, layer), Tally()).add(tensor)


class _Products(TorchFunctionMode):
    """Passes the result of every matrix product to a callback."""

    def __init__(self, add: Callable[[Any], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and reports its result if it is a matrix product."""
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self._add(result)
        return result


def _floating(value: Any) -> list[Tensor]:
    return [t for t in tensors_in(value) if t.is_floating_point()]


def _owned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns each floating-point parameter once, with the name of the module that owns it."""
    seen: set[int] = set()
    owned = []
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and parameter.is_floating_point():
                owned.append((name or ROOT, parameter))
            seen.add(id(parameter))
    return owned
