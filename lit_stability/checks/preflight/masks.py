"""Tests masks by perturbation: masked inputs must not change the outputs, unmasked inputs must.

A probe runs the model twice, on an input and on a changed input, and declares where the outputs
must be equal and where they must differ. This finds an inverted boolean mask (True = masked instead
of True = may attend) with any attention implementation. May import torch; does not import
Lightning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import take_small_steps
from lit_stability.checks.preflight.operations import WithoutDropout
from lit_stability.checks.preflight.report import DeclarationError, NotApplicableError
from lit_stability.checks.preflight.subject import StepError, Subject

TOLERANCE = 1e-3
"""Largest change, relative to the rms of the outputs, that counts as rounding: kernels sum in
another order if a length changes. A visible token changes the outputs by a hundred times more."""
_ONE_LOSS = 1e-5
"""Tolerance for the mean loss of a batch, to which one position contributes little. Shapes are
equal, so masked inputs leave the loss bitwise unchanged on most devices."""
_NO_EFFECT = 1e-3
"""Share of the tolerance; smaller changes mean that an input has no effect. It is this small
because a distant token may have little effect."""


@dataclass(frozen=True, kw_only=True)
class MaskProbe:
    """Declares which outputs may depend on a part of the input, and which outputs must.

    ``plain`` and ``changed`` run a model and return outputs of the same shape. ``hidden`` and
    ``seen`` are boolean tensors with the leading dimensions of the outputs. A LightningModule
    declares its probes in ``preflight_probes(batch)``.

    Args:
        name: The part of the input that is changed, such as "source padding".
        plain: Returns the outputs for the unchanged input.
        changed: Returns the outputs for the changed input.
        hidden: Where the outputs must not change, or None.
        seen: Where each output must change, or None.
        where: Name of the mask, or of the module that applies it. Probes with the same name are
            judged together: if one finds a leak and one finds a missing effect, the mask is
            reported as inverted.
        tolerance: Largest change that counts as rounding, in units of the rms of the outputs.

    Raises:
        ValueError: If both `hidden` and `seen` are None.
    """

    name: str
    plain: Callable[[nn.Module], Tensor]
    changed: Callable[[nn.Module], Tensor]
    hidden: Tensor | None = None
    seen: Tensor | None = None
    where: str = ""
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if self.hidden is None and self.seen is None:
            raise ValueError(
                f"the probe {self.name!r} tests nothing: hidden and seen are both None; give "
                "hidden=, seen= or both"
            )


@contextlib.contextmanager
def nudged(module: nn.Module, positions: Tensor, size: float = 1.0) -> Iterator[None]:
    """Changes the output of a module at some positions while the context is active.

    Use it on an embedding if the mask is computed from the ids, so that the ids cannot be changed.

    Args:
        module: Returns a tensor of shape ``(*positions.shape, width)``, such as an embedding.
        positions: Boolean; where to change the output.
        size: Size of the change, in units of the rms of the output.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if output.shape[: positions.ndim] != positions.shape:
            return None
        rms = output.detach().float().square().mean().sqrt()
        wave = torch.arange(output.shape[-1], device=output.device).cos().to(output.dtype)
        return output + positions[..., None] * wave * (size * rms).to(output.dtype)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_masks(subject: Subject, probes: Sequence[MaskProbe]) -> list[Finding]:
    """Runs every probe in eval mode, with the same random numbers.

    Probes that find a missing effect run a second time after small steps on all weights, because a
    sublayer whose gain starts at zero passes nothing through at first.

    Raises:
        NotApplicableError: If there is no probe, and the batch has no ``attention_mask``.
        DeclarationError: If a probe returns outputs of different shapes.
    """
    probes = [*probes, *padding_probes(subject)]
    if not probes:
        raise NotApplicableError(
            "no probe is declared (preflight_probes on the module), and the batch has no "
            "attention_mask next to ids"
        )
    model = subject.model().eval()
    results = [(probe, _try(subject, model, probe)) for probe in probes]
    if any(change.blind for _, change in results):
        results = _retry_after_small_steps(subject, results)
    leaking = {probe.where for probe, change in results if change.leaks}
    inverted = leaking & {probe.where for probe, change in results if change.blind}
    return [
        _finding(probe, change, inverted=probe.where in inverted)
        for probe, change in results
        if change.leaks or change.blind
    ]


def _retry_after_small_steps(
    subject: Subject, results: list[tuple[MaskProbe, _Change]]
) -> list[tuple[MaskProbe, _Change]]:
    """Repeats probes with a missing effect after small steps; keeps the results if these fail."""
    model = subject.model()
    try:
        take_small_steps(subject, model)
    except (StepError, NotApplicableError):
        return results
    model.eval()
    return [
        (probe, _try(subject, model, probe) if change.blind and not change.leaks else change)
        for probe, change in results
    ]


@dataclass(frozen=True)
class _Change:
    """The change of the outputs under a probe, in units of their rms."""

    hidden: float | None
    """Largest change where the outputs must not change, or None."""
    seen: float | None
    """Smallest change where the outputs must change, or None."""
    tolerance: float

    @property
    def leaks(self) -> bool:
        return self.hidden is not None and self.hidden > self.tolerance

    @property
    def blind(self) -> bool:
        return self.seen is not None and self.seen < self.tolerance * _NO_EFFECT


def _try(subject: Subject, model: nn.Module, probe: MaskProbe) -> _Change:
    with torch.no_grad(), subject.context():
        before, after = probe.plain(model).float(), probe.changed(model).float()
    if before.shape != after.shape:
        raise DeclarationError(
            f"the probe {probe.name!r} compares outputs of shapes {tuple(before.shape)} and "
            f"{tuple(after.shape)}; return the same positions from plain and changed"
        )
    rms = before[before.isfinite()].square().mean().sqrt()
    # The output of a query with only masked keys is NaN in both runs; this counts as a change.
    change = ((after - before).abs() / rms.clamp(min=1e-12)).nan_to_num(nan=torch.inf)
    hidden, seen = _places(change, probe.hidden), _places(change, probe.seen)
    return _Change(
        None if hidden is None else float(hidden.max()),
        None if seen is None else float(seen.min()),
        probe.tolerance,
    )


def _places(change: Tensor, where: Tensor | None) -> Tensor | None:
    """Returns the largest change at each selected position, or None if no position is selected."""
    if where is None or not bool(where.any()):
        return None
    return change[where].reshape(int(where.sum()), -1).amax(1)


def _finding(probe: MaskProbe, change: _Change, *, inverted: bool) -> Finding:
    what, why, remedy = _INVERTED if inverted else _LEAK if change.leaks else _BLIND
    numbers = []
    if change.leaks:
        numbers.append(f"outputs that must not see it change by {change.hidden:.3g} of their rms")
    if change.blind:
        numbers.append(f"outputs that must see it change by {change.seen:.3g} of their rms")
    return Finding(
        check="masks",
        severity="error",
        what=f"{probe.name}: {what}; {', '.join(numbers)}",
        where=(probe.where,) if probe.where else (),
        why=why,
        remedy=remedy,
    )


_INVERTED = (
    "the mask is inverted",
    "the model sees only padding or the future; the loss still falls, but the model is useless",
    "pass ~mask: True means 'may attend' to scaled_dot_product_attention, and 'masked' to "
    "nn.MultiheadAttention and nn.Transformer",
)
_LEAK = (
    "it is seen where it must not be",
    "the target or padding leaks into the inputs: the training loss is too low, or depends on the "
    "other samples in the batch",
    "apply the mask in every layer; if it is applied, it may be inverted: try ~mask",
)
_BLIND = (
    "it is not seen where it must be",
    "the model cannot use this part of its input",
    "check for a mask that covers too much or is inverted, and for an input that is not used",
)


def padding_probes(subject: Subject) -> list[MaskProbe]:
    """Returns probes for a batch with ``attention_mask`` next to ids of the same shape.

    By convention, 1 in a tensor of that name means "may attend". The loss must not depend on
    embeddings at masked positions, and must depend on embeddings at the others.
    """
    batch = subject.batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype.is_floating_point:
        return []
    ids = [n for n, x in batch.items() if isinstance(x, Tensor) and x.shape == mask.shape]
    open_BL = mask != 0
    if len(ids) < 2 or bool(open_BL.all()) or not bool(open_BL.any()):
        return []

    def loss(model: nn.Module, positions: Tensor | None = None) -> Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(WithoutDropout())
            for module in model.modules():
                if positions is not None and isinstance(module, nn.Embedding):
                    stack.enter_context(nudged(module, positions))
            return subject.loss(model).detach().reshape(1)

    everywhere = torch.ones(1, dtype=torch.bool, device=mask.device)
    return [
        MaskProbe(
            name="positions that attention_mask closes",
            where="attention_mask",
            tolerance=_ONE_LOSS,
            plain=loss,
            changed=lambda model: loss(model, ~open_BL),
            hidden=everywhere,
        ),
        MaskProbe(
            name="positions that attention_mask opens",
            where="attention_mask",
            tolerance=_ONE_LOSS,
            plain=loss,
            changed=lambda model: loss(model, open_BL),
            seen=everywhere,
        ),
    ]
