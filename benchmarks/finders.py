"""Tools that locate the origin of a NaN, behind one interface.

Each takes a model and a step function and returns a `Location` or None. Imports torch; the finder
of transformers imports that package itself.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability import locate_nonfinite

_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_BACKWARD = re.compile(r"Function '(\w+?)Backward\d*' returned nan")
ALIASES = {
    "linear": ("addmm", "mm", "linear", "mkldnnlinear", "t"),
    "layer_norm": ("nativelayernorm", "layernorm"),
    "batch_norm": ("nativebatchnorm", "batchnorm"),
    "cross_entropy": ("nllloss", "logsoftmax", "crossentropy"),
    "matmul": ("mm", "bmm", "matmul", "unsafeview"),
    "mse_loss": ("mseloss",),
    "masked_fill": ("maskedfill",),
    "index_put": ("indexput", "copyslices"),
}
"""Names of autograd functions by operation, where they differ."""


@dataclass(frozen=True)
class Location:
    """Location that a finder reports; None for a part that it does not report."""

    module: str | None = None
    op: str | None = None
    line: int | None = None

    def has_op(self, op: str) -> bool:
        """Returns whether the reported operation is `op` or an autograd name of it."""
        if self.op is None:
            return False
        return self.op == op or self.op.replace("_", "").lower() in (op, *ALIASES.get(op, ()))


def loss_of(output: Tensor | Mapping[str, Any]) -> Tensor:
    """Returns the loss in the output of a step."""
    loss = output["loss"] if isinstance(output, Mapping) else output
    assert isinstance(loss, Tensor)
    return loss


def by_search(model: nn.Module, step: Callable[[], Any]) -> Location | None:
    """Locates with `locate_nonfinite`."""
    origin = locate_nonfinite(model, step)
    return None if origin is None else Location(origin.module, origin.op, origin.line)


def by_anomaly_mode(model: nn.Module, step: Callable[[], Any]) -> Location | None:
    """Locates with ``torch.autograd.set_detect_anomaly``.

    Reads the function from the error and the line from the warning: the deepest line of the
    traceback outside torch.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                loss = loss_of(step())
                if loss.requires_grad:
                    loss.backward()
        except RuntimeError as error:
            match = _BACKWARD.search(str(error))
            traceback = "".join(_forward_tracebacks(caught))
            return Location(None, match[1] if match else None, _line(traceback))
        finally:
            model.zero_grad(set_to_none=True)
    return None


def _forward_tracebacks(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "Traceback of forward call" in str(w.message)]


def _line(traceback: str) -> int | None:
    frames = [(f, int(n)) for f, n in _FRAME.findall(traceback) if not f.startswith(_TORCH)]
    return frames[-1][1] if frames else None


def by_module_hooks(model: nn.Module, step: Callable[[], Any]) -> Location | None:
    """Locates with ``DebugUnderflowOverflow``: the module in the last frame of its report."""
    from transformers.debug_utils import DebugUnderflowOverflow

    class RecordLastFrame(DebugUnderflowOverflow):  # type: ignore[misc]
        last: list[str]

        def dump_saved_frames(self) -> None:
            """Records the last frame before it is printed."""
            self.last = str(self.frames[-1]).splitlines()
            super().dump_saved_frames()

    debug = RecordLastFrame(model)
    try:
        loss = loss_of(step())
        if loss.requires_grad:
            loss.backward()
    except ValueError as error:
        if "DebugUnderflowOverflow" not in str(error):
            raise
        return Location(module=_module(debug.last))
    finally:
        model.zero_grad(set_to_none=True)
        for module in model.modules():
            module._forward_hooks.clear()
    return None


def _module(frame: list[str]) -> str:
    """Returns the module path from the header of a frame; the root's path is empty."""
    headers = [line.split() for line in frame if line.startswith(" " * 17) and "***" not in line]
    return headers[-1][0] if len(headers[-1]) > 1 else ""


FINDERS: dict[str, Callable[[nn.Module, Callable[[], Any]], Location | None]] = {
    "locate_nonfinite": by_search,
    "detect_anomaly": by_anomaly_mode,
    "DebugUnderflowOverflow": by_module_hooks,
}
