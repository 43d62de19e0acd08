"""Checks the first batch: finite values of normal scale, masks and targets that leave something.

`operations` finds indices out of range. May import torch; does not import Lightning.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.measurement.tensor_tree import named_tensors

HUGE = 1e4
"""Beyond 1e4 a product of two elements overflows fp16 (65504)."""
UNNORMALISED = 50.0
"""Rms above which values were scaled neither to [0, 1] nor to variance 1; that of image bytes is
about 130."""


def check_batch(batch: Any) -> list[Finding]:
    """Finds values that are not finite or not normalised, and masks that mask everything.

    Raises:
        NotApplicableError: If the batch contains no tensor.
    """
    tensors = list(named_tensors(batch))
    if not tensors:
        raise NotApplicableError("there is no tensor in the batch")
    findings = []
    for name, tensor in tensors:
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            findings += _check_values(name, tensor)
        if "mask" in name.lower() and tensor.ndim > 1 and not tensor.is_complex():
            findings += _check_mask(name, tensor)
    return findings


def _check_values(name: str, tensor: Tensor) -> list[Finding]:
    bad = int((~tensor.isfinite()).sum())
    # By convention, a floating-point mask consists of 0 and -inf.
    if bad and "mask" not in name.lower():
        return [
            Finding(
                check="batch",
                severity="error",
                what=f"{bad} of {tensor.numel()} values are NaN or infinite",
                where=(name,),
                why="they make the loss and all gradients NaN; clipping does not help",
                remedy="clean the data, or drop these samples in the dataset",
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
            remedy="scale the data to variance 1, or to [0, 1]; check outliers and units",
        )
    ]


def _check_mask(name: str, mask: Tensor) -> list[Finding]:
    """Finds rows of a mask that leave nothing to attend to."""
    if mask.is_floating_point():
        closed = mask.isneginf().all(-1)
    elif "padding_mask" in name.lower():  # torch's own convention: True is masked
        closed = (mask != 0).all(-1)
    else:
        closed = (mask == 0).all(-1)
    if not bool(closed.any()):
        return []
    return [
        Finding(
            check="batch",
            severity="error" if bool(closed.all()) else "warning",
            what=f"{int(closed.sum())} of {closed.numel()} rows of the mask leave nothing to "
            "attend to",
            where=(name,),
            why="a softmax or a mean over nothing is NaN",
            remedy="drop empty samples; if the mask means the opposite (True = masked), name it "
            "padding_mask",
        )
    ]


def check_targets(seen: Observation) -> list[Finding]:
    """Finds classification losses that ignore all of their targets.

    Raises:
        NotApplicableError: If the step calls no classification loss.
    """
    if not seen.watch.losses:
        raise NotApplicableError("the step calls no classification loss")
    return [
        Finding(
            check="targets",
            severity="error",
            what=f"every target of a {call.kind} is ignored",
            where=(call.module,) if call.module else (),
            why="its mean is 0/0 = NaN, or nothing is learnt from the batch",
            remedy="check ignore_index, the padding of the labels, and the truncation",
        )
        for call in seen.watch.losses
        if call.targets == 0
    ]


def empty_epoch(
    *, samples: int | None = None, batch_size: int | None = None, drops_last: bool = False
) -> Finding:
    """Returns the finding of an epoch without a batch.

    Args:
        samples: Length of the dataset; None if it has none.
        batch_size: Samples of a batch; None if it is not known.
        drops_last: Whether an incomplete batch is left out.

    >>> empty_epoch(samples=100, batch_size=128, drops_last=True).what
    'an epoch has no batch: 100 samples, batches of 128, and drop_last=True'
    """
    known = samples is not None and batch_size is not None
    sizes = f": {samples} samples, batches of {batch_size}, and drop_last={drops_last}"
    short = samples is not None and batch_size is not None and drops_last and samples < batch_size
    remedy = (
        "check the dataset, its sampler and its filters; an iterable dataset must start again in "
        "each __iter__, which a generator does not"
    )
    if short:
        remedy = "set drop_last=False, or make the batches smaller"
    return Finding(
        check="batches",
        severity="error",
        what=f"an epoch has no batch{sizes if known else ''}",
        where=("train_dataloader",),
        why="no weight changes, and no error says so",
        remedy=remedy,
    )
