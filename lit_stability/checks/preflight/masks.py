"""Masks probed by perturbation: what may not be seen must change nothing, what must be seen must.

A probe runs the model twice and says where the outputs may differ and where they must. So an
inverted boolean mask (True = masked where True = may attend is meant) is named in a second,
whatever implements the attention. May import torch; knows no Lightning.
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
"""Largest change, relative to the rms of the outputs, that is rounding: kernels sum in another
order when a length changes. A token that is seen changes outputs by a hundred times that."""
_ONE_LOSS = 1e-5
"""The same for one loss over the batch, in which a position's part is small. Shapes are equal, so
that what is masked out changes nothing to the bit on most devices."""
_NOTHING = 1e-3
"""Share of the tolerance below which what must be seen is not; a far token may count for little."""


@dataclass(frozen=True, kw_only=True)
class MaskProbe:
    """What a change of the input may do to the outputs.

    ``plain`` and ``changed`` run a model and return outputs of the same shape; ``hidden`` and
    ``seen`` are boolean, of the outputs' leading dimensions: where the change may not show, and
    where, at each place, it must. A LightningModule declares its probes in
    ``preflight_probes(batch)``.

    Args:
        name: what is changed, such as "source padding".
        plain: outputs as they are.
        changed: outputs after the change.
        hidden: where nothing may change, or None.
        seen: where something must change, or None.
        where: the mask, or the module that applies it; probes of one are judged together, so that
            one that shows what it should hide and hides what it should show is called inverted.
        tolerance: largest change that is rounding, in units of the rms of the outputs.

    Raises:
        ValueError: if it says neither what is hidden nor what is seen.
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
            raise ValueError(f"the probe {self.name!r} asks nothing; give hidden=, seen= or both")


@contextlib.contextmanager
def nudged(module: nn.Module, positions: Tensor, size: float = 1.0) -> Iterator[None]:
    """Change the output of a module at some positions while the context is open.

    Ids cannot be changed where the mask is made from them; what is embedded can.

    Args:
        module: gives a tensor of shape (*positions.shape, width), such as an embedding.
        positions: boolean, where to change it.
        size: in units of the rms of the output.
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
    """Run every probe in eval mode, under the same random numbers.

    What is not seen where it must be is looked for once more after small steps on every weight: a
    sublayer whose gain starts at zero lets nothing through at first, and learns to.

    Raises:
        NotApplicableError: there is no probe, and the batch has no ``attention_mask``.
        DeclarationError: a probe returns outputs of different shapes.
    """
    probes = [*probes, *padding_probes(subject)]
    if not probes:
        raise NotApplicableError(
            "no probe is declared (preflight_probes on the module), and the batch has no "
            "attention_mask beside ids"
        )
    model = subject.model().eval()
    shown = [(probe, _try(subject, model, probe)) for probe in probes]
    if any(change.blind for _, change in shown):
        shown = _without_the_sleeping(subject, shown)
    leaking = {probe.where for probe, change in shown if change.leaks}
    inverted = leaking & {probe.where for probe, change in shown if change.blind}
    return [
        _finding(probe, change, inverted=probe.where in inverted)
        for probe, change in shown
        if change.leaks or change.blind
    ]


def _without_the_sleeping(
    subject: Subject, shown: list[tuple[MaskProbe, _Change]]
) -> list[tuple[MaskProbe, _Change]]:
    """Probe what was not seen again on a model that has moved; where none can, all stays."""
    model = subject.model()
    try:
        take_small_steps(subject, model)
    except (StepError, NotApplicableError):
        return shown
    model.eval()
    return [
        (probe, _try(subject, model, probe) if change.blind and not change.leaks else change)
        for probe, change in shown
    ]


@dataclass(frozen=True)
class _Change:
    """What a probe's change did, in units of the outputs' rms."""

    hidden: float | None
    """The largest where nothing may change, or None."""
    seen: float | None
    """The smallest, over the places where something must."""
    tolerance: float

    @property
    def leaks(self) -> bool:
        return self.hidden is not None and self.hidden > self.tolerance

    @property
    def blind(self) -> bool:
        return self.seen is not None and self.seen < self.tolerance * _NOTHING


def _try(subject: Subject, model: nn.Module, probe: MaskProbe) -> _Change:
    with torch.no_grad(), subject.context():
        before, after = probe.plain(model).float(), probe.changed(model).float()
    if before.shape != after.shape:
        raise DeclarationError(
            f"the probe {probe.name!r} compares outputs of shapes {tuple(before.shape)} and "
            f"{tuple(after.shape)}; return the same positions from plain and changed"
        )
    rms = before[before.isfinite()].square().mean().sqrt()
    # A query that sees nothing but what is masked is NaN in both: that is a change that shows.
    change = ((after - before).abs() / rms.clamp(min=1e-12)).nan_to_num(nan=torch.inf)
    hidden, seen = _places(change, probe.hidden), _places(change, probe.seen)
    return _Change(
        None if hidden is None else float(hidden.max()),
        None if seen is None else float(seen.min()),
        probe.tolerance,
    )


def _places(change: Tensor, where: Tensor | None) -> Tensor | None:
    """The largest change at each of some places, or None if there is no place."""
    if where is None or not bool(where.any()):
        return None
    return change[where].reshape(int(where.sum()), -1).amax(1)


def _finding(probe: MaskProbe, change: _Change, *, inverted: bool) -> Finding:
    fault = _INVERTED if inverted else _LEAK if change.leaks else _BLIND
    numbers = []
    if change.leaks:
        numbers.append(f"outputs that may not see it change by {change.hidden:.3g} of their rms")
    if change.blind:
        numbers.append(f"outputs that must see it change by {change.seen:.3g} of their rms")
    return Finding(
        check="masks",
        severity="error",
        what=f"{probe.name}: {fault[0]}; {', '.join(numbers)}",
        where=(probe.where,) if probe.where else (),
        why=fault[1],
        remedy=fault[2],
    )


_INVERTED = (
    "the mask is inverted",
    "the model sees padding or the future alone, still trains after a fashion, and is of no use",
    "pass ~mask: True means 'may attend' to scaled_dot_product_attention, and 'masked' to "
    "nn.MultiheadAttention and nn.Transformer",
)
_LEAK = (
    "it is seen where it must not be",
    "the answer, or noise, is among the inputs: the training loss is too good, or depends on what "
    "else is in the batch",
    "apply the mask in every layer; if it is applied, it may be inverted: try ~mask",
)
_BLIND = (
    "it is not seen where it must be",
    "the model cannot use what it is given",
    "look for a mask that covers too much, or is inverted, and for an input that is not used",
)


def padding_probes(subject: Subject) -> list[MaskProbe]:
    """The probe of a batch that has ``attention_mask`` beside ids of its shape.

    By that name 1 means "may attend" throughout the field. The loss may not change with what is
    embedded at masked positions, and must with what is embedded at one that is not.
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
