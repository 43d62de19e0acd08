"""DDP: every rank holds all weights, and the gradients are averaged."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from lit_stability.lightning_package import LightningModule
from lit_stability.trainer_internals.incident_checkpoint import own_checkpoint
from lit_stability.trainer_internals.strategies.adapter import Sharing, StrategyAdapter


class DDPAdapter(StrategyAdapter):
    """Answers for `DDPStrategy`."""

    @property
    def sharing(self) -> Sharing:
        """Replicas; alone with one rank; untried with model averaging."""
        if self._strategy._model_averaging_period is not None:
            return "untried"
        return "alone" if self._trainer.world_size == 1 else "replicas"

    @property
    def why_unsupported(self) -> str:
        """Model averaging."""
        return "with model averaging the ranks' gradients are not averaged at every step"

    @property
    def saves_incidents_together(self) -> bool:
        """Rank 0 saves alone: the other ranks may have seen no anomaly."""
        return self.sharing != "replicas"

    def module_converted(self) -> None:
        """Wraps the module again: the old buckets have the old dtype, ranks would diverge."""
        if self.sharing != "replicas":
            return
        strategy, module = self._strategy, self._trainer.lightning_module
        strategy.model = module
        # The old wrapper removes its hooks when it is deleted; it is part of a reference cycle.
        gc.collect()
        strategy.model = strategy._setup_model(module)
        strategy._register_ddp_hooks()

    def checkpoint(self) -> dict[str, Any]:
        """Returns Lightning's on rank 0; on others without weights and optimizer states."""
        checkpoint = super().checkpoint()
        if not self._trainer.is_global_zero:
            checkpoint |= {"state_dict": {}, "optimizer_states": []}
        return checkpoint

    def own_buffers(self, pl_module: LightningModule) -> dict[str, Any]:
        """Returns none: before each forward pass DDP gives all ranks those of rank 0.

        Unless that is turned off.
        """
        shared = self.sharing == "replicas" and self._strategy.model.broadcast_buffers
        return {} if shared else super().own_buffers(pl_module)

    def save_incident(self, path: Path) -> None:
        """Saves without synchronising, as the other ranks do not take part."""
        if self.sharing != "replicas":
            super().save_incident(path)
        else:
            self._strategy.save_checkpoint(own_checkpoint(self._trainer), path)
