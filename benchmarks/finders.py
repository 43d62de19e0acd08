"""Finders of a NaN's origin behind one interface: each takes a model and a step, and tells.

May import torch; transformers inside the finder that is of it.
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
"""Names of autograd's functions for the operations of a program, where they differ."""


@dataclass(frozen=True)
class Told:
    """What a finder says of a step; None is what it does not speak of."""

    module: str | None = None
    op: str | None = None
    line: int | None = None

    def names(self, op: str) -> bool:
        """Whether the operation told is the one meant."""
        if self.op is None:
            return False
        return self.op == op or self.op.replace("_", "").lower() in (op, *ALIASES.get(op, ()))


def loss_of(output: Tensor | Mapping[str, Any]) -> Tensor:
    """The loss that a step returns."""
    loss = output["loss"] if isinstance(output, Mapping) else output
    assert isinstance(loss, Tensor)
    return loss


def by_search(model: nn.Module, step: Callable[[], Any]) -> Told | None:
    """`locate_nonfinite`."""
    origin = locate_nonfinite(model, step)
    return None if origin is None else Told(origin.module, origin.op, origin.line)


def by_anomaly_mode(model: nn.Module, step: Callable[[], Any]) -> Told | None:
    """``torch.autograd.set_detect_anomaly``: the function is in the error, the line in a warning.

    The line is the deepest of the traceback that is not torch's own.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                loss = loss_of(step())
                if loss.requires_grad:
                    loss.backward()
        except RuntimeError as error:
            found = _BACKWARD.search(str(error))
            return Told(None, found[1] if found else None, _line("".join(_texts(caught))))
        finally:
            model.zero_grad(set_to_none=True)
    return None


def _texts(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "Traceback of forward call" in str(w.message)]


def _line(traceback: str) -> int | None:
    frames = [(f, int(n)) for f, n in _FRAME.findall(traceback) if not f.startswith(_TORCH)]
    return frames[-1][1] if frames else None


def by_module_hooks(model: nn.Module, step: Callable[[], Any]) -> Told | None:
    """``DebugUnderflowOverflow``: the module is that of the last frame of its report."""
    from transformers.debug_utils import DebugUnderflowOverflow

    class Reported(DebugUnderflowOverflow):  # type: ignore[misc]
        last: list[str]

        def dump_saved_frames(self) -> None:
            """Keep what is to be printed."""
            self.last = str(self.frames[-1]).splitlines()
            super().dump_saved_frames()

    debug = Reported(model)
    try:
        loss = loss_of(step())
        if loss.requires_grad:
            loss.backward()
    except ValueError as error:
        if "DebugUnderflowOverflow" not in str(error):
            raise
        return Told(module=_module(debug.last))
    finally:
        model.zero_grad(set_to_none=True)
        for module in model.modules():
            module._forward_hooks.clear()
    return None


def _module(frame: list[str]) -> str:
    """Path and class stand at the head of a frame, without numbers; that of the root is empty."""
    heads = [line.split() for line in frame if line.startswith(" " * 17) and "***" not in line]
    return heads[-1][0] if len(heads[-1]) > 1 else ""


FINDERS: dict[str, Callable[[nn.Module, Callable[[], Any]], Told | None]] = {
    "locate_nonfinite": by_search,
    "detect_anomaly": by_anomaly_mode,
    "DebugUnderflowOverflow": by_module_hooks,
}
