"""Finds the attentions among the kernels of one forward pass, and measures each.

Fused kernels (``scaled_dot_product_attention`` with any backend) are recognised by name. A manual
attention, or one of `torch.nn.MultiheadAttention`, is a softmax over the output of a recent batched
product. Not found: a softmax inside a compiled function, ``flex_attention``, kernels of other
packages, and the single kernel of a frozen `torch.nn.TransformerEncoderLayer` in eval mode. May
import torch.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lit_stability.compat import CompiledCodeStaysCompiled
from lit_stability.distributed.dtensor import local
from lit_stability.measurement.attention_logits import (
    product_scores,
    sampled_scores,
    score_statistics,
)
from lit_stability.measurement.norms import DeviceReadings
from lit_stability.measurement.running_modules import RunningModules
from lit_stability.measurement.step_stats import ProbeReading

LOGIT, ENTROPY = "attention_logit", "attention_entropy"
_PRODUCTS = frozenset({"aten::bmm", "aten::baddbmm"})
_SOFTMAX = frozenset({"aten::_softmax", "aten::_safe_softmax"})
_FUSED = "aten::_scaled_dot_product_"
_RECENT = 4
"""Number of remembered batched products; few run between the one of the scores and the softmax."""


def measure_attention(
    model: nn.Module, step: Callable[[], Any], modules: str | Sequence[str] = "*"
) -> list[ProbeReading]:
    """Measures every attention of a forward pass.

    >>> layer = torch.nn.MultiheadAttention(4, 2)
    >>> x = torch.zeros(3, 1, 4)
    >>> [(each.quantity, each.value) for each in measure_attention(layer, lambda: layer(x, x, x))]
    [('attention_logit', 0.0), ('attention_entropy', 1.0)]

    Args:
        model: gives the module names; it must not be compiled.
        step: runs the forward pass, such as ``lambda: model(batch)``; random generators and buffers
            advance as in any forward pass.
        modules: one or several globs of module names; attentions in other modules are skipped.

    Returns:
        For each module with attentions the largest absolute logit (``attention_logit``) and the
        mean entropy as a share of the largest possible (``attention_entropy``), both of a sample;
        see `lit_stability.measurement.attention_logits`.

    Raises:
        ValueError: if a glob matches no module.
    """
    with AttentionMonitor(model, modules) as monitor:
        step()
    if monitor.error is not None:
        raise monitor.error
    return monitor.readings()


class AttentionMonitor(CompiledCodeStaysCompiled):  # type: ignore[no-untyped-call]
    """Context manager that measures attentions without changing any result.

    An attention is named after the innermost module that runs it. `stop` ends the measurement
    before the exit, for instance when a backward pass starts inside. An attention that cannot be
    measured is skipped; ``error`` holds the first reason.

    Args:
        model: gives the module names.
        modules: one or several globs of module names; a match includes all modules inside it.

    Raises:
        ValueError: if a glob matches no module.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, modules: str | Sequence[str] = "*") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fitting = fitting(model, modules)
        self._modules = RunningModules(model)
        self._products: deque[tuple[int, int]] = deque(maxlen=_RECENT)
        self._measured: dict[str, list[Tensor]] = {}
        self._entered = False
        self.error: Exception | None = None
        """The first error that prevented a measurement."""

    def __enter__(self) -> "AttentionMonitor":
        """Registers the module hooks and enters the dispatch mode."""
        self._modules.follow()
        self._entered = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends the measurement, unless `stop` already has."""
        self._modules.stop()
        if self._entered:
            self._entered = False
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Ends the measurement; below another dispatch mode this one stays entered but is inert."""
        self._modules.stop()
        if self._entered and _get_current_dispatch_mode() is self:
            self.__exit__(None, None, None)

    def readings(self) -> list[ProbeReading]:
        """Returns the readings in one copy to the host; a module's attentions are merged."""
        unread = self.unread()
        return [] if unread is None else unread.read(unread.numbers.tolist())

    def unread(self) -> DeviceReadings | None:
        """Returns the measurements on their device; None if there was no attention."""
        rows = [row for measured in self._measured.values() for row in measured]
        if not rows:
            return None
        counts = {path: len(measured) for path, measured in self._measured.items()}
        numbers = torch.cat([row.to(rows[0].device) for row in rows])
        return DeviceReadings(numbers, lambda host: _all_readings(counts, host))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a kernel and, if it belongs to an attention, measures that."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if self._modules.followed and schema is not None:
            try:
                self._inspect(schema, args, kwargs, out)
            except Exception as error:
                # A failed measurement must never end a run.
                self.error = self.error or error
        return out

    def _inspect(self, schema: Any, args: Any, kwargs: Any, out: Any) -> None:
        name: str = schema.name
        if name in _PRODUCTS:
            self._products.append((out.numel(), out.shape[-1]))
        elif name in _SOFTMAX:
            scores, last = args[0], args[1] in (-1, args[0].dim() - 1)
            if last and scores.dim() > 2 and (scores.numel(), scores.shape[-1]) in self._products:
                self._measure(scores, lambda: sampled_scores(scores))
        elif name.startswith(_FUSED) and "backward" not in name:
            inputs = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
            self._measure(inputs["query"], lambda: _scores_of(inputs))

    def _measure(self, tensor: Tensor, scores: Callable[[], Tensor]) -> None:
        path = self._modules.innermost
        if (
            path not in self._fitting
            or tensor.numel() == 0
            or tensor.is_meta
            or local(tensor) is not tensor  # operators on a DTensor would communicate
            or _is_captured(tensor)
        ):
            return
        with torch.no_grad():  # below autograd and autocast, which do not affect this code
            self._measured.setdefault(path, []).append(score_statistics(scores()))


def fitting(model: nn.Module, modules: str | Sequence[str]) -> frozenset[str]:
    """Returns the names of the modules that match a glob, and of all modules inside them.

    Raises:
        ValueError: if a glob matches no module.
    """
    paths = [path for path, _ in model.named_modules()]
    matching: set[str] = set()
    for pattern in [modules] if isinstance(modules, str) else modules:
        matches = {path for path in paths if fnmatchcase(path, pattern)}
        if not matches:
            shown = [repr(path) for path in paths if path][:12]
            raise ValueError(
                f"modules={pattern!r} matches no module; there are {', '.join(shown) or 'none'}"
                f"{', ...' if len(paths) > 13 else ''}"
            )
        matching |= matches
    return frozenset(
        p for p in paths if any(p == m or not m or p.startswith(f"{m}.") for m in matching)
    )


def _scores_of(inputs: dict[str, Any]) -> Tensor:
    """Computes the scores of a fused kernel; its mask is ``attn_mask`` or ``attn_bias``."""
    return product_scores(
        inputs["query"],
        inputs["key"],
        inputs.get("attn_mask", inputs.get("attn_bias")),
        is_causal=inputs.get("is_causal", False),
        scale=inputs.get("scale"),
    )


def _all_readings(counts: dict[str, int], numbers: Sequence[float]) -> list[ProbeReading]:
    rows = iter([list(numbers[i : i + 3]) for i in range(0, len(numbers), 3)])
    return [r for path, n in counts.items() for r in _readings(path, list(islice(rows, n)))]


def _readings(path: str, rows: list[list[float]]) -> list[ProbeReading]:
    largest = max((row[0] for row in rows), key=lambda x: math.inf if math.isnan(x) else x)
    readings = [ProbeReading(LOGIT, path, largest)]
    count = sum(row[2] for row in rows)
    if count:
        readings.append(ProbeReading(ENTROPY, path, sum(row[1] for row in rows) / count))
    return readings


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which would include our kernels in every replay."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
