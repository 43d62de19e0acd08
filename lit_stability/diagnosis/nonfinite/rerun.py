"""`locate_nonfinite`: runs a bad step again and finds the operation that made its NaN or Inf.

May import torch, but not Lightning.
"""

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
from lit_stability.diagnosis.nonfinite.variables import attributes_of
from lit_stability.diagnosis.nonfinite.watch import Source, Watch
from lit_stability.measurement.compiled import has_compiled_parts
from lit_stability.training_state.isolated_model import IsolatedModel


def locate_nonfinite(
    model: nn.Module, step: Callable[[], Tensor | Mapping[str, Any]]
) -> NonFiniteOrigin | None:
    """Finds the operation that made the NaN or Inf of one bad step.

    The step is run again: forward, and if its loss is finite, backward. If loss and gradients are
    finite, the result is None, whatever infinities the step used in between. If only gradients are
    non-finite, the backward pass is the cause, and the operation is the one of the forward pass
    whose gradient it is.

    Afterwards the state is restored, even if the step raises: gradients, buffers, generators,
    training flags, and every other existing tensor that was written to. Objects that are not
    tensors are not restored. Compiled parts run eagerly, since a compiled part hides its
    operations. To compute the same values as the first time, generators and buffers must be in the
    state in which the bad step began. If parameters are sharded, all ranks must call this.

    >>> model = torch.nn.Linear(2, 1)
    >>> origin = locate_nonfinite(model, lambda: model(torch.zeros(1, 2)).abs().sum().sub(9).log())
    >>> origin.op
    'log'

    Args:
        model: provides the names and types of modules, parameters and buffers; the gradients of
            its parameters are checked.
        step: computes the loss without a backward pass and returns it, a scalar tensor or a mapping
            with one as ``loss``; it must enter precision contexts and scale the loss by itself.

    Returns:
        The first operation that made a non-finite value which reached the loss or a gradient.

    Raises:
        ValueError: if the step does not return a scalar loss.
    """
    state = IsolatedModel(model)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _eager():
            torch.clear_autocast_cache()  # earlier casts were not watched
            return _run(model, step, state)
    finally:
        torch.clear_autocast_cache()
        state.restore()


def _run(model: nn.Module, step: Callable[[], Any], state: IsolatedModel) -> NonFiniteOrigin | None:
    with CallSites(model, state.remove_gradient) as calls, Watch(model, calls, state) as watch:
        loss = _scalar(step())
        if is_nonfinite(loss):
            return _finished(model, watch.origin_of(_source(watch, loss)))
        if not loss.requires_grad:
            return None
        watch.in_backward = True
        _backward(loss)
        sources = [
            _source(watch, p.grad)
            for p in model.parameters()
            if p.grad is not None and is_nonfinite(p.grad)
        ]
    if not sources:
        return None
    first = min(sources, key=lambda s: (s.intended, s.order))
    return _finished(model, _seen_in_gradients(watch.origin_of(first)))


def _backward(loss: Tensor) -> None:
    # torch.autograd.backward is itself a watched function, and no function is watched inside of
    # another: the operations of custom Functions would have no name.
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
        f"step() must return its loss, a tensor of one element or a mapping with it as 'loss'; "
        f"it returned {shown}"
    )


def _source(watch: Watch, tensor: Tensor) -> Source:
    """Returns the source of a non-finite tensor, whether a watched operation made it or not."""
    memory = storage_of(tensor)._cdata
    return watch.source_of(tensor) or watch.source_outside(Operand("loss", tensor, memory))


def _seen_in_gradients(origin: NonFiniteOrigin) -> NonFiniteOrigin:
    if origin.phase == "backward":
        return origin
    return replace(origin, phase="backward", note="made in the forward pass; the loss is finite")


def _finished(model: nn.Module, origin: NonFiniteOrigin) -> NonFiniteOrigin:
    if origin.cause == "constant" and origin.tensor not in _nonfinite_attributes(model):
        # The step has replaced it: it is state, such as a hidden state that is carried along.
        origin = replace(origin, cause="buffer", kind="non-finite buffer")
    if not has_compiled_parts(model):
        return origin
    notes = (origin.note, "compiled parts were run eagerly")
    return replace(origin, note="; ".join(n for n in notes if n))


def _nonfinite_attributes(model: nn.Module) -> set[str]:
    return {name for name, tensor in attributes_of(model) if is_nonfinite(tensor)}


def _eager() -> AbstractContextManager[Any]:
    """Returns a context that runs compiled parts eagerly; does not load the compiler needlessly."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
