"""Records facts about the operations of a forward pass: losses, logarithms, softmaxes, masks.

Operations are intercepted where they are called (`torch.overrides.TorchFunctionMode`), in a module
or in a `training_step`; operations inside torch's own functions are not visible. An index out of
range raises an error before its kernel runs, because on a GPU it would end the process. May import
torch; does not import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.comparisons import Comparisons
from lit_stability.checks.preflight.subject import StepError

_LOGS = {torch.log, torch.log2, torch.log10, Tensor.log, Tensor.log2, Tensor.log10, Tensor.log_}
_SOFTMAXES = {torch.softmax, F.softmax, Tensor.softmax, torch.log_softmax, F.log_softmax}
_RELUS = {F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_}
_DROPOUTS = {
    *(torch.dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
    F.feature_alpha_dropout,
}


@dataclass(frozen=True)
class LossCall:
    """One call of a classification loss."""

    kind: str
    """"cross entropy" or "binary"."""
    module: str
    classes: int
    """Number of classes; 2 for a binary loss."""
    targets: int
    """Number of targets, without ignored ones."""
    mean: float
    """Mean loss per target, nats."""
    constant: bool
    """Whether the logits are identical for all targets."""
    head: str = ""
    """Module with weights that ran last before it."""


@dataclass(frozen=True)
class Fault:
    """An operation called with arguments that give a non-finite or meaningless result."""

    operation: str
    module: str
    elements: int
    """Number of affected elements or rows."""
    total: int
    """Number of all elements or rows."""


@dataclass(frozen=True)
class Activation:
    """The output of one ReLU call."""

    module: str
    zeros: float
    """Share of zero elements, from 0 to 1."""
    elements: int


class Watch(TorchFunctionMode):
    """Records facts about the operations that are called while the context is active.

    Args:
        current: Returns the name of the module that is running.
        head: Returns the name of the module with weights that ran last.
    """

    def __init__(self, current: Callable[[], str], head: Callable[[], str] = str) -> None:
        super().__init__()
        self._current, self._head = current, head
        self.comparisons = Comparisons(current, head)
        self.losses: list[LossCall] = []
        self.faults: list[Fault] = []
        self.relus: list[Activation] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Inspects the arguments of an operation, then runs it."""
        kwargs = kwargs or {}
        with torch.no_grad():
            self._inspect(func, args, kwargs)
            self.comparisons.inspect(func, args, kwargs)
        result = func(*args, **kwargs)
        self.comparisons.finished(func, result)
        if func in _RELUS:
            zeros = float((result.detach() == 0).float().mean())
            self.relus.append(Activation(self._current(), zeros, result.numel()))
        return result

    def _inspect(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if func is F.embedding:
            self._indices(*args[:2], **{k: v for k, v in kwargs.items() if k in _EMBEDDING})
        elif func is F.cross_entropy:
            self._cross_entropy(*args, **kwargs)
        elif func in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy):
            self._binary(func, *args, **kwargs)
        elif func in _LOGS:
            x = args[0].detach()
            self._fault("log of 0 or less", x <= 0)
        elif func in _SOFTMAXES:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(dim, int):
                self._fault("softmax of a row that is all -inf", args[0].eq(-torch.inf).all(dim))
        elif func is F.scaled_dot_product_attention:
            self._mask(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        elif func is F.layer_norm:
            rows = args[0].flatten(-len(args[1] if len(args) > 1 else kwargs["normalized_shape"]))
            flat = rows.amax(-1) == rows.amin(-1)
            if bool(flat.all()) and rows.shape[-1] > 1:
                self._fault("layer norm of rows without variance", flat)

    def _fault(self, operation: str, bad: Tensor) -> None:
        if count := int(bad.sum()):
            self.faults.append(Fault(operation, self._current(), count, bad.numel()))

    def _indices(self, input: Tensor, weight: Tensor) -> None:
        _require_range(input, len(weight), "an embedding", self._current())

    def _mask(self, mask: Tensor | None) -> None:
        if mask is None:
            return
        closed = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        self._fault("attention of a query that may attend to nothing", closed.all(-1))
        if mask.ndim > 1 and mask.shape[-1] == mask.shape[-2] > 1 and not closed.all():
            causal = torch.ones_like(closed).tril()
            if bool((closed == causal).all()):
                self._fault(
                    "attention mask that opens the future only", causal.all(-1).logical_not()
                )

    def _cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        classes = input.shape[1 if input.ndim > 1 else 0]
        counted = torch.ones_like(input[:, 0] if input.ndim > 1 else input[0], dtype=torch.bool)
        if not target.is_floating_point():
            counted = target != ignore_index
            _require_range(target[counted], classes, "a cross entropy", self._current())
        losses = F.cross_entropy(
            input.detach().float(),
            target if not target.is_floating_point() else target.float(),
            ignore_index=ignore_index,
            reduction="none",
        )[counted]
        logits = input.movedim(1, -1).flatten(0, -2) if input.ndim > 1 else input[None]
        self._loss("cross entropy", classes, losses, logits)

    def _binary(self, func: Any, input: Tensor, target: Tensor, *_: Any, **__: Any) -> None:
        losses = func(input.detach().float(), target.float(), reduction="none")
        self._loss(
            "binary", 2, losses.flatten(), input.flatten(1) if input.ndim > 1 else input[:, None]
        )

    def _loss(self, kind: str, classes: int, losses: Tensor, logits: Tensor) -> None:
        n = losses.numel()
        constant = len(logits) > 1 and bool((logits == logits[:1]).all())
        mean = float(losses.mean()) if n else float("nan")
        self.losses.append(
            LossCall(kind, self._current(), classes, n, mean, constant, self._head())
        )


_EMBEDDING = ("input", "weight")


def _require_range(indices: Tensor, size: int, what: str, module: str) -> None:
    """Raises an error if an index is outside of a table with `size` rows, before a kernel reads it.

    Raises:
        StepError: If an index is negative, or not less than `size`.
    """
    if not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low >= 0 and high < size:
        return
    bad = low if low < 0 else high
    raise StepError(
        Finding(
            check="batch",
            severity="error",
            what=f"{what} of {size} rows or classes is given the index {bad}",
            where=(module,),
            why="a CPU raises an error; a GPU ends the process, or reads memory out of bounds",
            remedy="compare the vocabulary or the label map of the data with the size of the model",
        )
    )


class WithoutDropout(TorchFunctionMode):
    """Disables dropout and label smoothing in all functions called while the context is active."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation without dropout and label smoothing."""
        options = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else options["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            options |= {} if len(args) > 4 else {"dropout_p": 0.0}
        elif func is F.cross_entropy and len(args) < 8:
            options["label_smoothing"] = 0.0
        return func(*args, **options)


def quiet_dropout(model: nn.Module) -> None:
    """Sets the dropout probability to 0 in modules whose dropout `WithoutDropout` cannot see."""
    for module in model.modules():
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.dropout = 0.0
