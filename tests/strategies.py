"""Strategies that Lightning runs on a GPU only, made to run on a CPU."""

import os
from argparse import Namespace

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
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
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


register_strategy(FSDP1OnCPU, like="fsdp1")


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """DeepSpeed over gloo, which Lightning allows on a GPU only."""

    def __init__(self, *, stage, **options):
        os.environ["DS_ACCELERATOR"] = "cpu"
        super().__init__(stage=stage, zero_allow_untested_optimizer=True, **options)
        # Else DeepSpeed compiles an optimizer of its own.
        self.config["zero_force_ds_cpu_optimizer"] = False

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        import deepspeed

        # Shared memory between ranks, which is compiled for a minute and a half.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, optimizer, *_ = deepspeed.initialize(
            args=Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer


register_strategy(DeepSpeedOnCPU, like="deepspeed")
