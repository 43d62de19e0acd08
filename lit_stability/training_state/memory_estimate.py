"""`estimate_memory`: what the suite takes beside a training. May import torch, not Lightning."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.measurement.tensor_tree import size_of
from lit_stability.training_state.byte_sizes import as_text
from lit_stability.training_state.snapshot_memory import Place
from lit_stability.training_state.tensor_parts import has_usual_memory, memory_of

Strategy = Literal["single", "ddp", "fsdp2"]
_SLOW_OPTIONS = {"fused": False, "foreach": False, "capturable": False}
"""Options with which an optimizer steps on any device."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that the default suite takes on each rank, beside the training itself."""

    snapshot: int
    """Of one snapshot: trained weights, buffers and state of the optimizer. Two are kept."""
    frozen: int
    """Of the one copy of the frozen weights."""
    batches: int
    """Of the batches to replay; 0 without a batch to measure."""
    incident: int
    """While the step of an incident is run again: its gradients, and copies of the buffers."""
    checkpoint: int
    """Of the copy that `LastKnownGood` keeps; 0 on several ranks."""
    snapshot_device: Place
    """Where the snapshots are kept."""

    @property
    def device(self) -> int:
        """Bytes in the memory of the weights."""
        snapshots = 2 * self.snapshot if self.snapshot_device == "device" else 0
        return snapshots + self.frozen + self.incident

    @property
    def host(self) -> int:
        """Bytes in the memory of the host, which on a CPU is that of the weights too."""
        snapshots = 2 * self.snapshot if self.snapshot_device == "host" else 0
        return snapshots + self.batches + self.checkpoint

    @property
    def total(self) -> int:
        """Bytes in both memories together."""
        return self.device + self.host

    def __str__(self) -> str:
        return (
            f"The suite takes {as_text(self.device)} on the device and {as_text(self.host)} on the "
            f"host, with two snapshots of {as_text(self.snapshot)} on the {self.snapshot_device}."
        )


def estimate_memory(
    module: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    strategy: Strategy = "single",
    *,
    ranks: int = 1,
    snapshot_device: Place = "device",
    batch: Any = None,
    snapshot_every: int = 20,
) -> MemoryEstimate:
    """Returns the bytes that the default suite takes beside a training, without running it.

    A snapshot holds the trained weights, the buffers and the state of the optimizers. Two are kept,
    one copy of the frozen weights, and the batches since the older snapshot. An optimizer that has
    not taken a step yet takes one on the device "meta", where nothing is computed and nothing is
    allocated, to see which state it makes.

    Args:
        module: to be trained; on the device "meta" too.
        optimizer: one or several; None for one without state.
        strategy: how the ranks share the weights.
        ranks: number of ranks among which FSDP2 will shard the weights; 1 if they are sharded
            already.
        snapshot_device: `AutoRollback`'s, where "auto" has been decided.
        batch: one batch, as the loader returns it.
        snapshot_every: `AutoRollback`'s, times the batches of a step if gradients are accumulated.

    Raises:
        ValueError: if an argument is out of its range, or the state of an optimizer cannot be
            foreseen.
        TypeError: if ``optimizer`` is a class.

    >>> net = nn.Linear(1024, 1024)
    >>> found = estimate_memory(net, torch.optim.AdamW(net.parameters()))
    >>> as_text(found.snapshot), as_text(found.device), as_text(found.host)
    ('12.0 MiB', '28.0 MiB', '12.0 MiB')
    """
    _check(strategy, ranks, snapshot_device, snapshot_every)
    if isinstance(optimizer, type):
        name = optimizer.__name__
        raise TypeError(f"optimizer is the class {name}; create it: {name}(module.parameters())")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    trained = sum(_weight_bytes(p) for p in module.parameters() if p.requires_grad)
    frozen = sum(_weight_bytes(p) for p in module.parameters() if not p.requires_grad)
    buffers = sum(map(_weight_bytes, module.buffers()))
    state = sum(map(_state_bytes, optimizers))
    shards = ranks if strategy == "fsdp2" else 1
    trained, frozen, state = (-(-nbytes // shards) for nbytes in (trained, frozen, state))
    snapshot = trained + buffers + state
    return MemoryEstimate(
        snapshot=snapshot,
        frozen=frozen,
        batches=2 * snapshot_every * size_of(batch),
        incident=trained + 3 * buffers,
        checkpoint=snapshot + frozen if strategy == "single" else 0,
        snapshot_device=snapshot_device,
    )


def _check(strategy: object, ranks: object, snapshot_device: object, every: object) -> None:
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be 'single', 'ddp' or 'fsdp2', got {strategy!r}")
    if snapshot_device not in get_args(Place):
        raise ValueError(f"snapshot_device must be 'device' or 'host', got {snapshot_device!r}")
    for name, value in (("ranks", ranks), ("snapshot_every", every)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


def _weight_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a weight, as if one on the device "meta" were on a real one."""
    if tensor.is_meta:
        return tensor.numel() * tensor.element_size()
    frozen = not tensor.requires_grad and isinstance(tensor, nn.Parameter)
    return 0 if frozen and not has_usual_memory(tensor) else memory_of(tensor)


def _state_bytes(optimizer: Optimizer) -> int:
    """Returns the bytes of an optimizer's state after a step."""
    states = optimizer.state or _after_a_step(optimizer).state
    values = (value for state in states.values() for value in state.values())
    return sum(_weight_bytes(value) for value in values if isinstance(value, Tensor))


def _after_a_step(optimizer: Optimizer) -> Optimizer:
    """Returns an optimizer of the same kind that has taken a step on the device "meta".

    Raises:
        ValueError: if it cannot, for example because it needs a closure.
    """
    stepped = None
    try:
        stepped = _on_meta(optimizer)
        stepped.step()
    except Exception as error:
        # The state is made before the update, which may need the value of a number.
        if stepped is None or not _has_all_state(stepped):
            raise ValueError(
                f"the state of {type(optimizer).__name__} cannot be foreseen ({error}); call "
                "estimate_memory after its first step"
            ) from error
    return stepped


def _has_all_state(optimizer: Optimizer) -> bool:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return all(optimizer.state.get(p) for p in weights if p.grad is not None)


def _on_meta(optimizer: Optimizer) -> Optimizer:
    """Returns an optimizer with the same options for weights and gradients without content."""
    groups = []
    for group in optimizer.param_groups:
        weights = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        trained = (w for w, p in zip(weights, group["params"], strict=True) if p.requires_grad)
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        slow = {name: value for name, value in _SLOW_OPTIONS.items() if name in group}
        groups.append({**group, "lr": float(group["lr"]), **slow, "params": weights})
    known = inspect.signature(type(optimizer)).parameters
    options = {**optimizer.defaults, **_SLOW_OPTIONS, "lr": float(groups[0]["lr"])}
    given = {k: v for k, v in options.items() if k in known and k in optimizer.defaults}
    return type(optimizer)(groups, **given)
