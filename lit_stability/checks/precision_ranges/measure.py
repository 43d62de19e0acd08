"""What a model spans: its weights, and over some batches its activations and gradients.

The model runs in float32, whatever it is stored in: a value that has overflowed in fp16 is Inf
and no longer tells by how much, one that has vanished is zero. May import torch; knows no
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
"""Functions that autocast runs in 16 bits, and which models call outside of any submodule."""


def measure_ranges(
    model: nn.Module,
    step: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    adam_epsilon: float = 1e-8,
) -> RangeReport:
    """Measure weights, activations and gradients over some batches, and update nothing.

    A float32 copy of the model takes the steps, in training mode. The model itself, its
    gradients, buffers and mode, and the random generators are left as they are.

    Args:
        model: on the device of the batches.
        step: from the copy and a batch to the loss, a scalar; it must call the copy that it is
            given. Gradients are those of this loss, without a loss scale.
        batches: what is given to `step`, one at a time; floating-point tensors in float32.
        adam_epsilon: of the optimizer that the model is trained with.

    Raises:
        ValueError: if there is no batch, or a loss is no scalar, or it gives no gradients.

    >>> model = nn.Linear(2, 1)
    >>> report = measure_ranges(model, lambda m, x: m(x).sum(), [torch.ones(3, 2)])
    >>> report.row("weight gradients", "(model)").largest
    3.0
    """
    twin = deepcopy(model).float().train()  # which leaves the gradients behind
    generators = capture_rng()
    probe = Probe(twin)
    try:
        with probe, torch.enable_grad():
            for batch in batches:
                _take_step(probe, twin, step, batch)
    finally:
        restore_rng(generators)
    if not probe.batches:
        raise ValueError("batches is empty; give at least one, a few if they differ")
    return probe.report(adam_epsilon)


def _take_step(
    probe: Probe, twin: nn.Module, step: Callable[[nn.Module, Any], Tensor], batch: Any
) -> None:
    probe.saw_batch(batch)
    loss = step(twin, batch)
    if not (isinstance(loss, Tensor) and loss.numel() == 1):
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ValueError(f"step returned {shape}; return the loss, a tensor with one element")
    probe.saw_loss(loss)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    if all(p.grad is None for p in twin.parameters()):
        raise ValueError(
            "the loss gives the model no gradient: step(model, batch) has to call the model that "
            "it is given, a float32 copy, and return a loss that is not detached"
        )
    probe.saw_gradients()
    twin.zero_grad()


class Probe:
    """Measures a model as it is trained, from the beginning of a ``with`` block to its end.

    Activations are what submodules return, each counted once however many modules hand it on, and
    the matrix products that a module computes without a submodule, such as attention scores. What
    happens inside a fused kernel, such as `scaled_dot_product_attention`, cannot be seen.
    Weights and gradients are those of the parameters that a module owns itself; a shared one
    belongs to the first.

    Args:
        model: in float32, its parameters at their final place.
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
        """Batches seen."""

    def __enter__(self) -> Probe:
        """Measure the weights, and begin to listen."""
        self._order = [INPUT, *(name or ROOT for name, _ in self._model.named_modules()), LOSS]
        self._owners = _owned(self._model)
        for layer, parameter in self._owners:
            self._count("weights", layer, parameter)
        for name, module in self._model.named_modules():
            before, after = partial(self._before, name or ROOT), partial(self._after, name or ROOT)
            self._attached.callback(module.register_forward_pre_hook(before).remove)
            handle = module.register_forward_hook(after, always_call=True)
            self._attached.callback(handle.remove)
        self._attached.enter_context(_Products(self._saw_product))
        return self

    def __exit__(self, *error: object) -> None:
        """Take every hook off again."""
        self._attached.close()
        self._last = []

    def saw_batch(self, batch: Any) -> None:
        """Count the floating-point tensors of a batch."""
        self.batches += 1
        self._running = []
        for tensor in _floating(batch):
            self._count("activations", INPUT, tensor)

    def saw_loss(self, loss: Tensor) -> None:
        """Count the loss, before any scaling."""
        self._count("activations", LOSS, loss)

    def saw_gradients(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Count the gradients of the weights, those of one batch.

        Args:
            parameters: whose gradients; by default those of all.
        """
        held = None if parameters is None else {id(p) for p in parameters}
        for layer, parameter in self._owners:
            if parameter.grad is not None and (held is None or id(parameter) in held):
                self._count("weight gradients", layer, parameter.grad)

    def report(self, adam_epsilon: float = 1e-8) -> RangeReport:
        """What was measured so far, in the order of the model."""
        place = {name: i for i, name in enumerate(self._order)}
        keys = sorted(self._tallies, key=lambda key: (KINDS.index(key[0]), place[key[1]]))
        rows = tuple(self._tallies[key].row(*key) for key in keys)
        found = {row.layer for row in rows}
        layers = tuple(name for name in self._order if name in found)
        return RangeReport(rows, layers, self.batches, adam_epsilon)

    def _before(self, layer: str, module: nn.Module, args: Any) -> None:
        self._running.append(layer)

    def _after(self, layer: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()
        self._saw_activations(layer, output)

    def _saw_product(self, result: Any) -> None:
        self._saw_activations(self._running[-1] if self._running else ROOT, result)

    def _saw_activations(self, layer: str, output: Any) -> None:
        found = _floating(output)
        for tensor in found:
            if any(tensor is each for each in self._last):  # handed on by the module around
                continue
            self._count("activations", layer, tensor)
            if tensor.requires_grad:
                hook = partial(self._count, "activation gradients", layer)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        self._last = found

    def _count(self, kind: Kind, layer: str, tensor: Tensor) -> None:
        if tensor.numel():
            self._tallies.setdefault((kind, layer), Tally()).add(tensor)


class _Products(TorchFunctionMode):
    """Shows the result of every matrix product."""

    def __init__(self, saw: Callable[[Any], None]) -> None:
        super().__init__()
        self._saw = saw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function as it would have been called."""
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self._saw(result)
        return result


def _floating(value: Any) -> list[Tensor]:
    return [t for t in tensors_in(value) if t.is_floating_point()]


def _owned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Each floating-point parameter once, with the name of the module that owns it."""
    seen: set[int] = set()
    owned = []
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and parameter.is_floating_point():
                owned.append((name or ROOT, parameter))
            seen.add(id(parameter))
    return owned
