"""A training step kept as a witness: its batch, its generators and the loss it really had.

A restored state that gives another loss for that batch under those generators is not the state
that was saved.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from lit_stability.trainer_internals.isolation import isolated_step
from lit_stability.training_state.rng import capture_rng, pack_rng, restore_rng, unpack_rng

_NAMED = "named tuple"
_PLAIN = (bool, int, float, str, type(None))


class ReferenceStep:
    """Keeps what the next ``training_step`` is given and what it returns.

    Args:
        max_bytes: a larger batch is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._undo: Callable[[], None] | None = None
        self.kept: dict[str, Any] | None = None
        """The step, once it was taken; what ``torch.load(weights_only=True)`` accepts."""
        self.obstacle: str | None = None
        """Why no step can be kept, or None."""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the next step."""
        self.cancel()
        self.kept = self.obstacle = None
        if not pl_module.automatic_optimization:
            self.obstacle = (
                "in manual optimization a training_step cannot be run without its update"
            )
            return
        before = vars(pl_module).get("training_step")
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.cancel()
            kept = self._before(trainer, args, kwargs)
            output = original(*args, **kwargs)
            self._after(kept, output)
            return output

        def undo() -> None:
            vars(pl_module).pop("training_step", None)
            if before is not None:
                vars(pl_module)["training_step"] = before

        vars(pl_module)["training_step"] = training_step
        self._undo = undo

    def cancel(self) -> None:
        """Leave the module as it was found."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _before(self, trainer: Trainer, args: Any, kwargs: Any) -> dict[str, Any] | None:
        extra = [*args[1:], *kwargs.values()]
        if not args or not all(isinstance(x, _PLAIN) for x in extra):
            self.obstacle = "training_step is not called with a batch and its index"
            return None
        self.obstacle = _unfit(args[0], self._max_bytes)
        if self.obstacle is not None:
            return None
        return {
            "batch": _packed(_on_host(args[0])),
            "extra": list(args[1:]),
            "named": dict(kwargs),
            "rng": pack_rng(capture_rng()),
            **_circumstances(trainer),
        }

    def _after(self, kept: dict[str, Any] | None, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else output
        if kept is None:
            return
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            self.obstacle = "training_step returns no loss"
            return
        self.kept = kept | {"loss": loss.detach().clone()}


def replay_loss(trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Any]) -> float:
    """The loss of the kept step now; generators, buffers and metrics are as before afterwards."""
    batch = move_data_to_device(_on_host(_unpacked(kept["batch"])), pl_module.device)
    with isolated_step(trainer, pl_module), torch.no_grad():
        restore_rng(unpack_rng(kept["rng"]))
        output = trainer.strategy.training_step(batch, *kept["extra"], **kept["named"])
    loss = output.get("loss") if isinstance(output, dict) else output
    return float(loss)  # type: ignore[arg-type]


def incomparable(trainer: Trainer, kept: Mapping[str, Any]) -> str | None:
    """Why the kept loss says nothing about this trainer, or None."""
    try:
        _unpacked(kept["batch"])
    except LookupError as error:
        return str(error)
    now = _circumstances(trainer)
    changed = [
        f"{name} was {kept[name]}, is {now[name]}" for name in now if kept[name] != now[name]
    ]
    return "; ".join(changed) or None


def same_loss(kept: Mapping[str, Any], loss: float) -> bool:
    """Whether two losses differ by rounding at most, in the precision that the step was kept in."""
    tolerance = 1e-2 if "16" in kept["precision"] else 1e-4
    return math.isclose(float(kept["loss"]), loss, rel_tol=tolerance, abs_tol=1e-7)


def same_batch(a: Any, b: Any) -> bool:
    """Whether two batches are equal in every element.

    >>> same_batch([torch.tensor([float("nan")]), "x"], [torch.tensor([float("nan")]), "x"])
    True
    >>> same_batch({"x": torch.zeros(2)}, {"x": torch.zeros(3)})
    False
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = b.detach().to(a.device)
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_batch(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_batch, a, b))
    return bool(a == b)


def _circumstances(trainer: Trainer) -> dict[str, str]:
    return {
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
    }


def _unfit(value: Any, room: int) -> str | None:
    """Why a batch cannot be kept, or None."""
    total = 0
    queue = [value]
    while queue:
        item = queue.pop()
        if type(item) is Tensor:
            total += item.numel() * item.element_size()
        elif type(item) in (dict, OrderedDict):
            queue += [*item.keys(), *item.values()]
        elif type(item) in (list, tuple) or _is_named(item):
            queue += item
        elif not isinstance(item, _PLAIN):
            return f"a checkpoint can hold no {type(item).__name__} as the batch has one"
    return f"the batch takes {total} bytes, more than {room}" if total > room else None


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((k, _on_host(v)) for k, v in value.items())
    if _is_named(value):
        return type(value)(*map(_on_host, value))
    return type(value)(map(_on_host, value)) if isinstance(value, (list, tuple)) else value


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _packed(value: Any) -> Any:
    """A batch with its named tuples as mappings, which a checkpoint can hold."""
    if _is_named(value):
        kind = type(value)
        fields = {name: _packed(getattr(value, name)) for name in value._fields}
        return {_NAMED: f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    if isinstance(value, dict):
        return type(value)((key, _packed(each)) for key, each in value.items())
    return type(value)(map(_packed, value)) if isinstance(value, (list, tuple)) else value


def _unpacked(value: Any) -> Any:
    """A batch with its named tuples.

    Raises:
        LookupError: a class is not among the modules that are loaded; none is imported.
    """
    if isinstance(value, dict) and _NAMED in value:
        fields = {name: _unpacked(each) for name, each in value["fields"].items()}
        return _loaded(value[_NAMED], tuple(fields))(**fields)
    if isinstance(value, dict):
        return type(value)((key, _unpacked(each)) for key, each in value.items())
    return type(value)(map(_unpacked, value)) if isinstance(value, (list, tuple)) else value


def _loaded(name: str, fields: tuple[str, ...]) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, tuple)):
        raise LookupError(f"the batch was a {path}, which {module} has no longer")
    if getattr(found, "_fields", None) != fields:
        raise LookupError(f"the batch was a {path} of {fields}, which has other fields now")
    return found
