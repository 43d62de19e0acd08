"""The first batch: finite, of a sane size, with masks that leave something and targets that count.

Indices out of range are found on the way, by `operations`. May import torch; knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import NotApplicableError

HUGE = 1e4
"""Beyond 1e4 a product of two elements overflows fp16 (65504)."""
UNNORMALISED = 50.0
"""Rms of values that were scaled neither to [0, 1] nor to variance 1; bytes of an image are at
about 130."""


def check_batch(batch: Any) -> list[Finding]:
    """Values that are not finite or far from normalised, and masks that close everything.

    Raises:
        NotApplicableError: there is no tensor in the batch.
    """
    tensors = list(named_tensors(batch))
    if not tensors:
        raise NotApplicableError("there is no tensor in the batch")
    findings = []
    for name, tensor in tensors:
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            findings += _values(name, tensor)
        if "mask" in name.lower() and tensor.ndim > 1 and not tensor.is_complex():
            findings += _mask(name, tensor)
    return findings


def _values(name: str, tensor: Tensor) -> list[Finding]:
    bad = int((~tensor.isfinite()).sum())
    # A float mask is 0 and -inf by convention.
    if bad and "mask" not in name.lower():
        return [
            Finding(
                check="batch",
                severity="error",
                what=f"{bad} of {tensor.numel()} values are NaN or infinite",
                where=(name,),
                why="they make the loss and every gradient NaN; clipping does not help",
                remedy="clean the data, or drop such samples in the dataset",
            )
        ]
    values = tensor[tensor.isfinite()].abs().float()
    if not values.numel():
        return []
    largest, rms = float(values.max()), float(values.square().mean().sqrt())
    if (largest <= HUGE and rms <= UNNORMALISED) or "mask" in name.lower():
        return []
    return [
        Finding(
            check="batch",
            severity="warning",
            what=f"values of up to {largest:.4g}, rms {rms:.4g}: not normalised",
            where=(name,),
            why="the first layer's outputs and gradients scale with them, and fp16 ends at 65504",
            remedy="scale the data to variance 1, or to [0, 1]; look for outliers and units",
        )
    ]


def _mask(name: str, mask: Tensor) -> list[Finding]:
    """Rows of a mask that leave nothing to attend to."""
    if mask.is_floating_point():
        shut = mask.isneginf().all(-1)
    elif "padding_mask" in name.lower():  # torch's own convention: True is left out
        shut = (mask != 0).all(-1)
    else:
        shut = (mask == 0).all(-1)
    if not bool(shut.any()):
        return []
    return [
        Finding(
            check="batch",
            severity="error" if bool(shut.all()) else "warning",
            what=f"{int(shut.sum())} of {shut.numel()} rows of the mask leave nothing to attend to",
            where=(name,),
            why="a softmax over nothing is NaN, a mean over nothing too",
            remedy="drop empty samples; if the mask means the opposite (True = left out), name it "
            "padding_mask, and hand it on as such",
        )
    ]


def check_targets(seen: Observation) -> list[Finding]:
    """Classification losses that no target counts in.

    Raises:
        NotApplicableError: no classification loss was called.
    """
    if not seen.watch.losses:
        raise NotApplicableError("no classification loss was called")
    return [
        Finding(
            check="targets",
            severity="error",
            what=f"every target of a {call.kind} is ignored",
            where=(call.module,) if call.module else (),
            why="its mean is 0/0, NaN, and if it is not, nothing is learnt from the batch",
            remedy="look at ignore_index, at the labels' padding, and at what truncation leaves",
        )
        for call in seen.watch.losses
        if call.targets == 0
    ]


def named_tensors(value: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch, with the path to each.

    >>> import torch
    >>> [name for name, _ in named_tensors({"x": torch.zeros(2), "more": [torch.ones(1)]})]
    ["batch['x']", "batch['more'][0]"]
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from named_tensors(each, f"{name}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, each in zip(value._fields, value, strict=True):
            yield from named_tensors(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from named_tensors(each, f"{name}[{i}]")
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for key, each in vars(value).items():
            if isinstance(each, (Tensor, Mapping, list, tuple)):
                yield from named_tensors(each, f"{name}.{key}")
