"""DeepSpeed's ZeRO: every rank holds a part of optimizer, gradients and, in stage 3, weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from lit_stability.lightning_package import LightningModule
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.strategies.adapter import Sharing, StrategyAdapter
from lit_stability.trainer_internals.strategies.zero_optimizer import ZeroOptimizer
from lit_stability.training_state.host_copy import is_finite
from lit_stability.training_state.rank_checkpoint_writer import FILES

_STAND_IN = "lit_stability"
"""Attribute of DeepSpeed's optimizer: the one that stands in for it."""

_COUNTS = ("global_steps", "global_samples", "skipped_steps")
"""Counters of DeepSpeed's engine, which it saves in its checkpoints."""

_OF_WEIGHTS = ("state_dict", "optimizer_states")
_TAG = "checkpoint"
"""Folder in which Lightning has DeepSpeed save."""
_ROOT = PurePath("good")


class _FilesInMemory:
    """Stands in for what writes the files of DeepSpeed, and keeps their content.

    Args:
        writer: answers what else DeepSpeed asks.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.content: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Keeps the content of a file."""
        self.content[PurePath(path).relative_to(_ROOT).as_posix()] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes no folder."""

    def create(self, info: Any) -> None:
        """Begins nothing."""

    def commit(self, info: Any) -> None:
        """Ends nothing."""


class DeepSpeedAdapter(StrategyAdapter):
    """Answers for `DeepSpeedStrategy` with ZeRO stage 1, 2 or 3."""

    @property
    def sharing(self) -> Sharing:
        """Shards; untried with what `why_unsupported` names."""
        return "untried" if self.why_unsupported else "shards"

    @property
    def trains_own_tensors(self) -> bool:
        """DeepSpeed trains copies in fp32."""
        return False

    @property
    def why_unsupported(self) -> str:
        """What the configuration of DeepSpeed asks for that was never tried."""
        config = self._strategy.config or {}
        zero = config.get("zero_optimization") or {}
        optimizer = str((config.get("optimizer") or {}).get("type", "")).lower()
        devices = (f"offload_{kind}" for kind in ("optimizer", "param"))
        offloaded = [(key, (zero.get(key) or {}).get("device", "none")) for key in devices]
        if zero.get("stage", 0) not in (1, 2, 3):
            return "of DeepSpeed ZeRO stages 1, 2 and 3 are supported; pass stage=2"
        for key, device in offloaded:
            if device == "nvme":
                return f"with {key} to NVMe DeepSpeed keeps its tensors on a disk between steps"
        if optimizer.startswith(("onebit", "zerooneadam")):
            return f"{optimizer} sends compressed gradients, whose norm no rank knows"
        if "pipeline" in config:
            return "a pipeline of DeepSpeed steps outside of Lightning"
        return ""

    @property
    def may_be_tried(self) -> bool:
        """Not at all: a step that is skipped in another way than DeepSpeed's hangs or is taken."""
        return False

    def can_measure(self) -> bool:
        """Returns whether DeepSpeed keeps gradients where they were found when it was tried."""
        return self.sharing != "untried"

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        return int(self._strategy.config["zero_optimization"]["stage"])

    @property
    def gathers_weights(self) -> bool:
        """In stage 3."""
        return self.stage == 3

    @property
    def why_no_rerun(self) -> str | None:
        """In stage 3 the weights are gathered by hooks that belong to the step."""
        return "under ZeRO stage 3 no rank has the weights that a step needs" * (self.stage == 3)

    @property
    def why_no_good_checkpoint(self) -> str | None:
        """With one rank: what is saved for that is not in DeepSpeed's files."""
        alone = self._trainer.world_size == 1
        return self.why_unsupported or ("DeepSpeed runs on one device" if alone else None)

    @property
    def why_precision_fixed(self) -> str | None:
        """The engine has the precision that it was created with."""
        return "DeepSpeed's engine fixes the precision when it is created"

    @property
    def steps_now(self) -> bool:
        """Whether DeepSpeed will take a step; its hooks are called for every batch."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @property
    def _engine(self) -> Any:
        return self._strategy.model

    @property
    def _zero(self) -> ZeroOptimizer:
        zero = self._engine.optimizer
        if _STAND_IN not in vars(zero):
            named = list(self._trainer.lightning_module.named_parameters())
            vars(zero)[_STAND_IN] = ZeroOptimizer(zero, named)
        stand_in: ZeroOptimizer = vars(zero)[_STAND_IN]
        return stand_in

    def attach(self) -> None:
        """Replaces the optimizer that Lightning passes to hooks by one with gradients."""
        self._zero.attach()
        self._strategy.optimizers = [self._zero]

    def detach(self) -> None:
        """Leaves the step to DeepSpeed's optimizer."""
        stand_in = getattr(getattr(self._engine, "optimizer", None), _STAND_IN, None)
        if stand_in is not None:
            stand_in.detach()

    def read_gradients(self) -> None:
        """Gives the parameters of `named_parameters` their gradients, if there is a step now."""
        if self.steps_now:
            self._zero.read_gradients()

    def named_parameters(self, pl_module: LightningModule) -> Iterable[tuple[str, Tensor]]:
        """Returns this rank's parts of the weights in fp32, then what is not trained."""
        parts = {part.name: part.tensor for part in self._zero.parts}
        rest = {n: p for n, p in pl_module.named_parameters() if n not in parts}
        return [*parts.items(), *rest.items()]

    def weights_in_use(self) -> Mapping[str, Tensor]:
        """Returns the weights in the precision of the module; in stage 3 this rank's part."""
        named: dict[str, Any] = dict(self._trainer.lightning_module.named_parameters())
        if self.stage < 3:
            return {part.name: named[part.name].detach() for part in self._zero.parts}
        # The last part is filled up with whatever was in memory.
        pairs = ((named[part.name].ds_tensor, part) for part in self._zero.parts)
        return {part.name: held.detach()[: part.tensor.numel()] for held, part in pairs}

    def part_shares(self, pl_module: LightningModule) -> Mapping[int, float]:
        """Returns 1 for each part: no two ranks hold the same."""
        return {id(part.tensor): 1.0 for part in self._zero.parts}

    def loss_scale(self) -> Tensor | None:
        """Returns the scale of DeepSpeed in fp16, else None."""
        if not self._engine.fp16_enabled():
            return None
        return torch.tensor(float(self._zero.zero.loss_scale))

    def scaled_loss(self, loss: Tensor) -> Tensor:
        """Returns the loss times the scale, which DeepSpeed applies after the hooks."""
        scale = self.loss_scale()
        return loss if scale is None else loss * scale.to(loss.device)

    def optimizers_to_copy(self) -> list[Any]:
        """Returns the optimizer whose state DeepSpeed keeps, of the flat weights."""
        return [self._zero.zero.optimizer]

    def tensors_to_copy(self) -> list[Tensor]:
        """Returns the flat weights in fp32, of which the others are made."""
        return self._zero.flats

    def parameters_to_leave(self) -> set[int]:
        """Returns the ids of the module's parameters that are made of the flat weights.

        Stage 3 gathers and frees frozen ones too, which nothing that training does can change.
        """
        trained = {part.name for part in self._zero.parts}
        named = self._trainer.lightning_module.named_parameters()
        return {id(p) for n, p in named if n in trained or hasattr(p, "ds_tensor")}

    def counts(self) -> dict[str, Any]:
        """Returns the counters of the engine, and the state of the loss scale."""
        scaler = self._zero.zero.loss_scaler
        return {
            "engine": {name: getattr(self._engine, name) for name in _COUNTS},
            "scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)},
        }

    def load_counts(self, counts: Mapping[str, Any]) -> None:
        """Restores what `counts` returned."""
        vars(self._engine).update(counts["engine"])
        vars(self._zero.zero.loss_scaler).update(counts["scaler"])

    def checkpoint(self) -> dict[str, Any]:
        """Returns Lightning's without weights, and the content of DeepSpeed's files of this rank.

        Raises:
            RuntimeError: on all ranks, if a hook has raised on one: DeepSpeed makes them wait.
        """
        checkpoint, error = {}, None
        try:
            checkpoint = super().checkpoint()
        except Exception as problem:
            error = problem
        if not self._strategy.reduce_boolean_decision(error is None):
            raise error or RuntimeError("another rank could not make its checkpoint")
        client = {k: v for k, v in checkpoint.items() if k not in _OF_WEIGHTS}
        return {**client, FILES: self._files(client)}

    def _files(self, client: dict[str, Any]) -> dict[str, Any]:
        """Returns what DeepSpeed would write, by the file's name in the folder."""
        engine, files = self._engine, _FilesInMemory(self._engine.checkpoint_engine)
        patch = Patch(engine, "_copy_recovery_script", lambda *args: None)
        patch.apply()
        written_by, engine.checkpoint_engine = engine.checkpoint_engine, files
        try:
            engine.save_checkpoint(
                str(_ROOT),
                client_state=client,
                tag=_TAG,
                save_latest=False,
                exclude_frozen_parameters=self._strategy.exclude_frozen_parameters,
            )
        finally:
            engine.checkpoint_engine = written_by
            patch.remove()
        return files.content

    def damaged(self) -> str | None:
        """Returns the first part of a weight, or of its moments, that is not finite."""
        for part in self._zero.parts:
            held = [part.tensor, *self._zero.state.get(part.tensor, {}).values()]
            if not all(is_finite(t) for t in held if isinstance(t, Tensor)):
                return part.name
        return None

    @torch.no_grad()
    def weights_restored(self) -> None:
        """Gives all ranks the weights in the precision of the module, made of those in fp32."""
        zero = self._zero.zero
        if self.stage < 3:
            zero._hp_optimizer_states_linked = False
            zero.update_lp_params()
            return
        pairs = zip(
            zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
        )
        for used, flat in pairs:
            used.copy_(flat)
        if persistent := zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
