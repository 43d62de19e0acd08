"""FSDP1: every rank holds a part of each group of weights, as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from lit_stability.lightning_package import LightningModule
from lit_stability.trainer_internals.strategies.adapter import Sharing, StrategyAdapter

_WRAPPER = "_fsdp_wrapped_module."


class FSDP1Adapter(StrategyAdapter):
    """Answers for `FSDPStrategy`.

    With ``use_orig_params=True`` a parameter is the part of it that this rank holds, which may be
    empty. Without, the parameters are those into which FSDP1 has joined the module's.
    """

    @property
    def sharing(self) -> Sharing:
        """Shards; untried where they are on the host."""
        offload = self._strategy.cpu_offload
        return "untried" if getattr(offload, "offload_params", offload) else "shards"

    @property
    def why_unsupported(self) -> str:
        """Shards on the host."""
        return "FSDP1 with cpu_offload was never tried, as it needs a GPU; leave it out"

    @property
    def trains_own_tensors(self) -> bool:
        """The optimizers' parameters are parts of a flat tensor, and the module's are freed."""
        return False

    @property
    def why_precision_fixed(self) -> str | None:
        """The shards have the dtype that they were created with."""
        return "FSDP1 fixes the dtype of its shards when it creates them (FSDP2 does not)"

    @property
    def why_no_good_checkpoint(self) -> str | None:
        """Its shards are not tensors that torch saves part by part."""
        return "of FSDP1 no rank can save its shards alone"

    def named_parameters(self, pl_module: LightningModule) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters, without the names of the wrappers."""
        for name, parameter in pl_module.named_parameters():
            yield name.replace(_WRAPPER, ""), parameter

    def part_shares(self, pl_module: LightningModule) -> dict[int, float]:
        """Returns the shares; less than 1 where groups of ranks hold the same parts."""
        shares: dict[int, float] = {}
        for handle in _handles(self._strategy.model):
            flat = handle.flat_param
            held = [flat, *(flat._params or ())]
            share = handle.world_size / self._trainer.world_size
            shares |= dict.fromkeys(map(id, held), share)
        return shares

    def eager_step(self, pl_module: LightningModule) -> Callable[..., Any]:
        """Returns ``training_step`` in the forward pass of the wrapper, which gathers weights."""
        redirect, model = self._strategy._forward_redirection, self._strategy.model
        return partial(redirect, model, pl_module, "training_step")

    def reshard(self, pl_module: LightningModule) -> None:
        """Frees the weights of a root module, which a forward pass alone leaves gathered."""
        from torch.distributed.fsdp._runtime_utils import _reshard

        for module in _modules(self._strategy.model):
            handle = module._handle
            # Before its first forward pass FSDP1 has gathered nothing.
            if handle is not None and module._is_root is not None:
                _reshard(module, handle, handle.uses_sharded_strategy)


def _modules(model: Any) -> list[Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.fsdp_modules(model)


def _handles(model: Any) -> Iterator[Any]:
    return (module._handle for module in _modules(model) if module._handle is not None)
