"""Watches the kernels of one forward pass for attentions, and measures each.

Fused kernels (``scaled_dot_product_attention``, whatever its backend) are known by their name; an
attention written by hand, or by `torch.nn.MultiheadAttention`, by a softmax over what a batched
product has just made. Not seen: a softmax inside a compiled function, ``flex_attention``, kernels
of other packages, and the single kernel that a frozen `torch.nn.TransformerEncoderLayer` is in
eval mode. May import torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.attention_logits import (
    product_scores,
    sampled_scores,
    score_statistics,
)
from lit_stability.measurement.norms import DeviceReadings
from lit_stability.measurement.step_stats import ProbeReading

LOGIT, ENTROPY = "attention_logit", "attention_entropy"
_PRODUCTS = frozenset({"aten::bmm", "aten::baddbmm"})
_SOFTMAX = frozenset({"aten::_softmax", "aten::_safe_softmax"})
_FUSED = "aten::_scaled_dot_product_"
_RECENT = 4
"""Batched products remembered: between that of queries and keys and the softmax, few come."""


def measure_attention(
    model: nn.Module, step: Callable[[], Any], modules: str | Sequence[str] = "*"
) -> list[ProbeReading]:
    """Measure every attention of a forward pass.

    Args:
        model: where the names of the modules are from; it must not be compiled.
        step: runs the forward pass, as ``lambda: model(batch)``; generators and buffers move as in
            any other.
        modules: glob of module names, or several; attentions in other modules are left out.

    Returns:
        For each module with attentions the largest absolute logit (``attention_logit``) and the
        mean entropy as a share of the largest possible (``attention_entropy``), of a sample; see
        `lit_stability.measurement.attention_logits`.

    Raises:
        ValueError: if a glob fits no module.
    """
    with AttentionMonitor(model, modules) as watch:
        step()
    if watch.error is not None:
        raise watch.error
    return watch.readings()


class AttentionMonitor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, measures attentions; changes nothing that is computed.

    An attention is known by the innermost module that runs it. `stop` ends the watch before it is
    left, as where a backward pass begins inside of it. What cannot be measured is left out, and
    ``error`` tells the first reason.

    Args:
        model: where the names of modules are from.
        modules: glob of module names, or several; a module that fits stands for all inside it.

    Raises:
        ValueError: if a glob fits no module.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, modules: str | Sequence[str] = "*") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._paths = {id(m): path for path, m in model.named_modules()}
        self._fitting = fitting(model, modules)
        self._stack = [""]
        self._thread = get_ident()
        self._handles: list[Any] = []
        self._products: deque[tuple[int, int]] = deque(maxlen=_RECENT)
        self._found: dict[str, list[Tensor]] = {}
        self._entered = False
        self.error: Exception | None = None
        """Why something was not measured."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run: otherwise it would be run, from then on, uncompiled."""
        return True

    def __enter__(self) -> AttentionMonitor:
        """Begin."""
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._entered = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End, if `stop` has not."""
        self._unhook()
        if self._entered:
            self._entered = False
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """End as far as possible: below another mode of torch's this one stays, and looks away."""
        self._unhook()
        if self._entered and _get_current_dispatch_mode() is self:
            self.__exit__(None, None, None)

    def readings(self) -> list[ProbeReading]:
        """What was measured, in one copy to the host; several attentions of a module as one."""
        unread = self.unread()
        return [] if unread is None else unread.read(unread.numbers.tolist())

    def unread(self) -> DeviceReadings | None:
        """What was measured, before it is copied; None where there was no attention."""
        rows = [row for each in self._found.values() for row in each]
        if not rows:
            return None
        counts = {path: len(each) for path, each in self._found.items()}
        numbers = torch.cat([row.to(rows[0].device) for row in rows])
        return DeviceReadings(numbers, lambda host: _all_readings(counts, host))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel, and look at it if it is of an attention."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if self._handles and schema is not None:
            try:
                self._look(schema, args, kwargs, out)
            except Exception as error:
                # What is measured must never be what ends a run.
                self.error = self.error or error
        return out

    def _look(self, schema: Any, args: Any, kwargs: Any, out: Any) -> None:
        name: str = schema.name
        if name in _PRODUCTS:
            self._products.append((out.numel(), out.shape[-1]))
        elif name in _SOFTMAX:
            scores, last = args[0], args[1] in (-1, args[0].dim() - 1)
            if last and scores.dim() > 2 and (scores.numel(), scores.shape[-1]) in self._products:
                self._measure(scores, lambda: sampled_scores(scores))
        elif name.startswith(_FUSED) and "backward" not in name:
            given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
            self._measure(given["query"], lambda: _scores_of(given))

    def _measure(self, tensor: Tensor, scores: Callable[[], Tensor]) -> None:
        path = self._stack[-1]
        if (
            path not in self._fitting
            or tensor.numel() == 0
            or tensor.is_meta
            or local(tensor) is not tensor  # its own operators would communicate
            or _is_captured(tensor)
        ):
            return
        with torch.no_grad():  # below autograd and autocast: neither touches what is done here
            self._found.setdefault(path, []).append(score_statistics(scores()))

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if self._counts():
            self._stack.append(self._paths.get(id(module), self._stack[-1]))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._counts() and len(self._stack) > 1:
            self._stack.pop()

    def _counts(self) -> bool:
        """Whether a module runs here: the hooks are called by all threads, and while compiling."""
        return not torch.compiler.is_compiling() and get_ident() == self._thread

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def fitting(model: nn.Module, modules: str | Sequence[str]) -> frozenset[str]:
    """Names of the modules that fit a glob, and of all modules inside them.

    Raises:
        ValueError: if a glob fits no module.
    """
    paths = [path for path, _ in model.named_modules()]
    fit: set[str] = set()
    for pattern in [modules] if isinstance(modules, str) else modules:
        found = {path for path in paths if fnmatchcase(path, pattern)}
        if not found:
            shown = [repr(path) for path in paths if path][:12]
            raise ValueError(
                f"modules={pattern!r} fits no module; there are {', '.join(shown) or 'none'}"
                f"{', ...' if len(paths) > 13 else ''}"
            )
        fit |= found
    return frozenset(p for p in paths if any(p == f or not f or p.startswith(f"{f}.") for f in fit))


def _scores_of(given: dict[str, Any]) -> Tensor:
    """The scores of a fused kernel; its mask is called ``attn_mask`` or ``attn_bias``."""
    return product_scores(
        given["query"],
        given["key"],
        given.get("attn_mask", given.get("attn_bias")),
        is_causal=given.get("is_causal", False),
        scale=given.get("scale"),
    )


def _all_readings(counts: dict[str, int], numbers: Sequence[float]) -> list[ProbeReading]:
    rows = iter([list(numbers[i : i + 3]) for i in range(0, len(numbers), 3)])
    return [r for path, n in counts.items() for r in _readings(path, list(islice(rows, n)))]


def _readings(path: str, rows: list[list[float]]) -> list[ProbeReading]:
    largest = max((row[0] for row in rows), key=lambda x: math.inf if math.isnan(x) else x)
    found = [ProbeReading(LOGIT, path, largest)]
    count = sum(row[2] for row in rows)
    if count:
        found.append(ProbeReading(ENTROPY, path, sum(row[1] for row in rows) / count))
    return found


def _is_captured(tensor: Tensor) -> bool:
    """Whether kernels are being recorded to be played back, with ours among them for ever."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
