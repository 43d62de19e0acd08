"""Strategies that Lightning runs on a GPU only, made to run on a CPU."""

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_stability import register_strategy


class FSDP1OnCPU(FSDPStrategy):
    """FSDP1 over gloo: Lightning passes the index of a GPU, which a CPU has not.

    Its checkpoints are sharded: torch cannot assemble a full one on a CPU, it crashes.
    """

    def __init__(self, *, use_orig_params=True, **options):
        super().__init__(
            state_dict_type="sharded",
            auto_wrap_policy={nn.Linear},
            use_orig_params=use_orig_params,
            **options,
        )

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


register_strategy(FSDP1OnCPU, like="fsdp1")
