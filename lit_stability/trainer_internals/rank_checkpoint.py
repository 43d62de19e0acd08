"""The checkpoint of one of several ranks: Lightning's, and what only this rank has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.strategies import sharing
from lit_stability.trainer_internals.trainer_view import full_checkpoint


def rank_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Returns the checkpoint of this rank; its tensors are not copies. All ranks must call it.

    Of sharded weights and optimizer states each rank has its shards. Of replicas rank 0 has them,
    and the others have neither.
    """
    if sharing(trainer) == "shards":
        with _shards_saved(trainer):
            return full_checkpoint(trainer)
    checkpoint = full_checkpoint(trainer)
    if not trainer.is_global_zero:
        checkpoint |= {"state_dict": {}, "optimizer_states": []}
    return checkpoint


@contextlib.contextmanager
def _shards_saved(trainer: Trainer) -> Iterator[None]:
    """Has the strategy return shards, and not gather the whole state on rank 0.

    Nor do the ranks communicate, as they do in torch's ``get_optimizer_state_dict``: a callback of
    one of them may raise before.
    """
    strategy: Any = trainer.strategy
    model = strategy.model
    patches = [
        Patch(strategy, "lightning_module_state_dict", lambda: _model_state(model)),
        Patch(strategy, "optimizer_state", lambda o: _optimizer_state(model, o)),
    ]
    for patch in patches:
        patch.apply()
    try:
        yield
    finally:
        for patch in patches:
            patch.remove()


def _model_state(model: nn.Module) -> dict[str, Any]:
    return {_uncompiled(name): tensor for name, tensor in model.state_dict().items()}


def _optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Returns the state of an optimizer, with parameters named as in the state of the model."""
    plain: Optimizer = getattr(optimizer, "optimizer", optimizer)
    names = {id(p): _uncompiled(name) for name, p in model.named_parameters()}
    saved = plain.state_dict()
    of_index: dict[int, str] = {}
    for group, own in zip(saved["param_groups"], plain.param_groups, strict=True):
        named = [names[id(p)] for p in own["params"]]
        of_index |= dict(zip(group["params"], named, strict=True))
        group["params"] = named
    state = {of_index[index]: value for index, value in saved["state"].items()}
    return {"state": state, "param_groups": saved["param_groups"]}


def _uncompiled(name: str) -> str:
    """Returns the name of a tensor in the module as it was before ``torch.compile``."""
    return name.replace("_orig_mod.", "")


def own_buffers(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Returns the buffers that this rank does not share, by name.

    DDP gives all ranks the buffers of rank 0 before each forward pass, unless that is turned off.
    With sharded weights each rank has buffers of its own, but all save those of rank 0.
    """
    model: Any = trainer.strategy.model
    if sharing(trainer) == "replicas" and model.broadcast_buffers:
        return {}
    saved = pl_module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in pl_module.named_buffers() if name in saved}
