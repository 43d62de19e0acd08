"""FSDP2: every rank holds a shard of each weight, as a ``DTensor``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_stability.lightning_package import LightningModule
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.strategies.adapter import Sharing, StrategyAdapter


class FSDP2Adapter(StrategyAdapter):
    """Answers for `ModelParallelStrategy` without tensor parallelism."""

    @property
    def sharing(self) -> Sharing:
        """Shards; alone with one rank."""
        return "alone" if self._trainer.world_size == 1 else "shards"

    @property
    def why_half_fixed(self) -> str | None:
        """The shards have the dtype that the weights had."""
        sharded = self.sharing == "shards"
        return "FSDP2 created its shards from half-precision weights" if sharded else None

    def reshard(self, pl_module: LightningModule) -> None:
        """Reshards modules: a forward pass without a backward pass leaves them unsharded."""
        if self.sharing != "shards":
            return
        for module in pl_module.modules():
            if callable(method := getattr(module, "reshard", None)) and hasattr(module, "unshard"):
                method()

    def checkpoint(self) -> dict[str, Any]:
        """Returns Lightning's, with the shards of this rank."""
        if self.sharing != "shards":
            return super().checkpoint()
        with self._shards_saved():
            return super().checkpoint()

    @contextlib.contextmanager
    def _shards_saved(self) -> Iterator[None]:
        """Has the strategy return shards, and not gather the whole state on rank 0.

        Nor do the ranks communicate, as they do in torch's ``get_optimizer_state_dict``: a callback
        of one of them may raise before.
        """
        model = self._strategy.model
        patches = [
            Patch(self._strategy, "lightning_module_state_dict", lambda: _model_state(model)),
            Patch(self._strategy, "optimizer_state", lambda o: _optimizer_state(model, o)),
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
