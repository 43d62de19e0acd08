"""Records an optimizer step from its start, and runs it again from there beside training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle

from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.bit_patterns import Difference, difference
from lit_stability.trainer_internals.isolation import ModuleAttributes, isolated_step
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.plain_attributes import PlainAttributes, owners_in
from lit_stability.trainer_internals.step_rerun import replaced_tensors
from lit_stability.trainer_internals.strategies import adapter_of
from lit_stability.trainer_internals.trainer_view import loss_scaler
from lit_stability.training_state.rng import capture_rng, restore_rng

LOSS = "the loss"
"""What the names of losses begin with."""


def why_not_recorded(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Returns why a step cannot be recorded from its start and run again, or None."""
    adapter = adapter_of(trainer)
    if not pl_module.automatic_optimization:
        return "in manual optimization a training_step cannot be run without its update"
    if adapter.gathers_weights:
        return "a rank holds only a part of the weights"
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        return "LBFGS runs the training_step several times in a step"
    plain = all(type(p) is nn.Parameter for p in pl_module.parameters())
    return None if plain else "some weights are no plain tensors"


@dataclass
class StepResult:
    """What a run of a step has computed."""

    numbers: dict[str, Tensor] = field(default_factory=dict)
    """Gradients by name of the parameter, and the loss of each micro-batch: as autograd has
    computed them on this rank, before they are averaged, unscaled or changed by a hook."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Weights and buffers at the end of the run, before the update."""
    writes: dict[str, int] = field(default_factory=dict)
    """How often operations wrote to each weight in the run."""


@dataclass
class _MicroBatch:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: dict[str, Any]
    buffers: list[tuple[dict[str, Any], str, Tensor]]
    """Table of a module, key in it, and the buffer itself: it may be replaced in the step."""
    copies: dict[int, Tensor]
    """Copies of the buffers by their ids."""
    attributes: tuple[PlainAttributes, ModuleAttributes]


class StepRecording:
    """The start of one optimizer step, the numbers that training computed in it, and reruns.

    The weights are copied at the first ``training_step`` of the step; buffers, batches, generators
    and attributes of modules at each. Memory: the weights and gradients once, and both once more
    in a rerun.

    Args:
        trainer: between two steps.
        pl_module: the module in training, for which `why_not_recorded` returns None.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module
        self._named = dict(pl_module.named_parameters())
        self._batches: list[_MicroBatch] = []
        self._weights: dict[int, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._training = StepResult()
        self.obstacle: str | None = None
        """Why steps cannot be run again, or None."""
        self.incomplete = False
        """Whether this step cannot be compared, as a ``training_step`` has returned None."""
        self._handles = _collect(self._named, self._training.numbers)
        self._original = pl_module.training_step
        self._patch = Patch(pl_module, "training_step", self._run)
        self._patch.apply()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Records the start of a micro-batch, and its loss."""
        try:
            self._record(args, kwargs)
        except Exception as error:  # training goes on
            self.obstacle = f"{type(error).__name__}: {error}"
        output = self._original(*args, **kwargs)
        loss = _loss_of(output)
        if loss is None:
            self.incomplete = True
        else:
            self._training.numbers[_loss_name(len(self._batches) - 1)] = loss.detach().clone()
        return output

    @torch.no_grad()
    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(isinstance(each, Iterator) for each in args):
            raise TypeError("training_step fetches its batches itself, from a dataloader_iter")
        if not self._batches:
            self._weights = {id(p): p.detach().clone() for p in self._named.values()}
            self._versions = {name: p._version for name, p in self._named.items()}
        owners = owners_in(self._trainer, self._module, of_torch=False)
        attributes = PlainAttributes(owners), ModuleAttributes(self._module)
        attributes[0].capture()
        self._batches.append(
            _MicroBatch(
                args=_cloned(args),
                kwargs=_cloned(kwargs),
                rng=capture_rng(),
                buffers=_places_of_buffers(self._module),
                copies={id(b): b.detach().clone() for b in self._module.buffers()},
                attributes=attributes,
            )
        )

    def stop(self) -> None:
        """Stops recording, after the last backward pass of the step."""
        self._patch.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.incomplete = self.incomplete or not self._batches

    @property
    def training(self) -> StepResult:
        """What training has computed, with weights and buffers as they are now."""
        self._training.state = self._state()
        self._training.writes = {
            name: p._version - self._versions[name] for name, p in self._named.items()
        }
        return self._training

    def _state(self) -> dict[str, Tensor]:
        named = (*self._module.named_parameters(), *self._module.named_buffers())
        return {name: tensor.detach() for name, tensor in named}

    def rerun(self) -> StepResult:
        """Runs the step again in copies, from its start; the state of training is restored."""
        before = self._changed_weights()
        attributes = PlainAttributes(owners_in(self._trainer, self._module, of_torch=False))
        attributes.capture()
        groups = [g for optimizer in self._trainer.optimizers for g in optimizer.param_groups]
        options = [{k: (v, _cloned(v)) for k, v in g.items() if k != "params"} for g in groups]
        try:
            return self._rerun()
        finally:
            attributes.restore()
            for group, own in zip(groups, options, strict=True):
                group.update({key: _restored(*pair) for key, pair in own.items()})
            self._restore_weights(before)

    def _rerun(self) -> StepResult:
        result = StepResult()
        copies = {
            id(p): nn.Parameter(self._weights[id(p)].clone(), requires_grad=p.requires_grad)
            for p in self._named.values()
        }
        by_name = {name: copies[id(p)] for name, p in self._named.items()}
        versions = {name: copy._version for name, copy in by_name.items()}
        handles = _collect(by_name, result.numbers)
        with ExitStack() as stack:
            stack.enter_context(isolated_step(self._trainer, self._module))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.enable_grad())
            for index, micro in enumerate(self._batches):
                with replaced_tensors(self._module, lambda t: copies.get(id(t), t)):
                    fresh = {key: copy.clone() for key, copy in micro.copies.items()}
                    for table, key, buffer in micro.buffers:
                        table[key] = fresh[id(buffer)]
                    result.numbers[_loss_name(index)] = self._run_again(micro)
                    result.state = self._state()
                for copy in by_name.values():
                    copy.grad = None
        for handle in handles:
            handle.remove()
        result.writes = {name: copy._version - versions[name] for name, copy in by_name.items()}
        return result

    def _run_again(self, micro: _MicroBatch) -> Tensor:
        """Runs forward and backward pass of one micro-batch as Lightning does; returns the loss."""
        trainer, module = self._trainer, self._module
        for each in micro.attributes:
            each.restore()
        restore_rng(micro.rng)
        step = adapter_of(trainer).eager_step(module)
        with trainer.precision_plugin.train_step_context():
            loss = _loss_of(step(*_cloned(micro.args), **_cloned(micro.kwargs)))
        assert loss is not None, "training would have had no loss either"
        share = loss / trainer.accumulate_grad_batches
        scaler = loss_scaler(trainer)
        module.backward(share if scaler is None else scaler.scale(share))
        return loss.detach().clone()

    @torch.no_grad()
    def _changed_weights(self) -> dict[int, Tensor]:
        """Returns copies of the weights that are no longer those of the start."""
        pairs = ((p, self._weights[id(p)]) for p in self._named.values())
        return {id(p): p.detach().clone() for p, start in pairs if difference("", p, start)}

    @torch.no_grad()
    def _restore_weights(self, before: Mapping[int, Tensor]) -> None:
        """Restores weights that the rerun wrote to, as code with references of its own does."""
        for name, p in self._named.items():
            value = before.get(id(p), self._weights[id(p)])
            if difference("", p, value) is not None:
                p.copy_(value)
                self.obstacle = f"training_step writes to {name} by a reference of its own"

    def changed_outside(self, rerun: StepResult) -> list[Difference]:
        """Returns the weights and buffers that something else than the step has changed since."""
        now = self.training
        found = (difference(n, now.state[n], t) for n, t in rerun.state.items() if n in now.state)
        return [each for each in found if each is not None]

    def written_outside(self, rerun: StepResult) -> set[str]:
        """Returns the weights to which an operation wrote outside of the ``training_step``."""
        now = self.training.writes
        return {name for name, count in rerun.writes.items() if now[name] != count}


def _collect(named: Mapping[str, Tensor], totals: dict[str, Tensor]) -> list[RemovableHandle]:
    """Adds up the gradients that autograd computes, before any other hook changes them."""
    handles = []
    for name, tensor in named.items():
        if not tensor.requires_grad:
            continue

        def add(grad: Tensor, name: str = name) -> None:
            known = totals.get(name)
            own = grad.detach()
            totals[name] = own.clone() if known is None else known + own

        handle: RemovableHandle = tensor.register_hook(add)  # type: ignore[no-untyped-call]
        hooks: Any = tensor._backward_hooks
        hooks.move_to_end(handle.id, last=False)
        handles.append(handle)
    return handles


def _places_of_buffers(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    tables = (each._buffers for each in module.modules())
    return [(table, k, b) for table in tables for k, b in table.items() if b is not None]


def _loss_of(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) else None


def _loss_name(index: int) -> str:
    return LOSS if index == 0 else f"{LOSS} of micro-batch {index}"


@torch.no_grad()
def _restored(value: Any, copy: Any) -> Any:
    """Returns a value with what it was when it was copied, such as a learning rate."""
    return value.copy_(copy) if type(value) is Tensor else value


def _cloned(value: Any) -> Any:
    """Returns a copy of the containers and tensors of a batch; other objects are the same."""
    if type(value) is Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {key: _cloned(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_cloned, value))
    return value
