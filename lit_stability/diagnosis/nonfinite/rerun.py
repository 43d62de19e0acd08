"""Runs one bad step again, watched, and tells where its NaN or Inf was born.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from lit_stability.diagnosis.nonfinite.call_sites import CallSites
from lit_stability.diagnosis.nonfinite.kernel_call import Operand
from lit_stability.diagnosis.nonfinite.origin import NonFiniteOrigin
from lit_stability.diagnosis.nonfinite.values import is_nonfinite, storage_of
from lit_stability.diagnosis.nonfinite.watch import Birth, Watch
from lit_stability.measurement.compiled import has_compiled_parts
from lit_stability.training_state.isolated_model import IsolatedModel


def locate_nonfinite(
    model: nn.Module, step: Callable[[], Tensor | Mapping[str, Any]]
) -> NonFiniteOrigin | None:
    """Find the operation in which the NaN or Inf of one bad step was born.

    The step is run again: forward, and if its loss is finite backward. Where loss and gradients
    are finite there is nothing to tell, whatever infinities the step used on the way. Where nothing
    but the gradients is non-finite, the backward pass is to blame, and the operation named is the
    one of the forward pass whose gradient it is.

    Afterwards all is as it was, also if the step raises: gradients, buffers, generators, training
    flags, and any other tensor that was there before and was written to. Objects that are no
    tensors are not. Parts that were compiled run eagerly, as a compiled part hides its operations.
    For the same values as the first time, generators and buffers must be in the state they were in
    when the bad step began; with several ranks whose parameters are sharded, all must call this.

    Args:
        model: names and types of modules, parameters and buffers are taken from it, and its
            parameters' gradients are what has to be finite.
        step: computes the loss and returns it, a scalar tensor or a mapping with one as ``loss``,
            without a backward pass; precision contexts and loss scaling are its own affair.

    Returns:
        The first operation which made a non-finite value that reached the loss or a gradient.

    Raises:
        ValueError: where the step returns no scalar loss.
    """
    state = IsolatedModel(model)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _eager():
            torch.clear_autocast_cache()  # what was cast before was not watched
            return _run(model, step, state)
    finally:
        torch.clear_autocast_cache()
        state.restore()


def _run(model: nn.Module, step: Callable[[], Any], state: IsolatedModel) -> NonFiniteOrigin | None:
    with CallSites(model, state.remove_gradient) as calls, Watch(model, calls, state) as watch:
        loss = _scalar(step())
        if is_nonfinite(loss):
            return _finished(model, _birth(watch, loss).origin)
        if not loss.requires_grad:
            return None
        watch.in_backward = True
        _backward(loss)
        births = [
            _birth(watch, p.grad)
            for p in model.parameters()
            if p.grad is not None and is_nonfinite(p.grad)
        ]
    if not births:
        return None
    first = min(births, key=lambda b: (b.excused, b.order))
    return _finished(model, _spoiling_gradients(first.origin))


def _backward(loss: Tensor) -> None:
    # torch.autograd.backward is a watched function itself, within which no other is watched: the
    # operations of custom Functions would go unnamed.
    _engine_run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _scalar(loss: Any) -> Tensor:
    if isinstance(loss, Mapping):
        loss = loss.get("loss")
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise ValueError(
        f"step() must return its loss, a tensor of one element or a mapping that has it as 'loss'; "
        f"it returned {shown}"
    )


def _birth(watch: Watch, tensor: Tensor) -> Birth:
    """Also of a tensor that no watched operation made."""
    memory = storage_of(tensor)._cdata
    return watch.birth_of(tensor) or watch.birth_outside(Operand("loss", tensor, memory))


def _spoiling_gradients(origin: NonFiniteOrigin) -> NonFiniteOrigin:
    if origin.phase == "backward":
        return origin
    return replace(
        origin, phase="backward", note="made in the forward pass; the loss does not show it"
    )


def _finished(model: nn.Module, origin: NonFiniteOrigin) -> NonFiniteOrigin:
    if not has_compiled_parts(model):
        return origin
    notes = (origin.note, "compiled parts were run eagerly")
    return replace(origin, note="; ".join(n for n in notes if n))


def _eager() -> AbstractContextManager[Any]:
    """Loading the compiler takes seconds; without it nothing can have been compiled."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
