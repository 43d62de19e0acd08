"""A reference step: one training step saved with its batch, generator states and loss.

After a resume the step is run again. If its loss differs, the restored state is not the saved one.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_stability.lightning_package import LightningModule, Trainer, move_data_to_device
from lit_stability.trainer_internals.isolation import isolated_step
from lit_stability.trainer_internals.patch import Patch
from lit_stability.training_state.rng import capture_rng, pack_rng, restore_rng, unpack_rng

_NAMED = "named tuple"
_PLAIN = (bool, int, float, str, type(None))


class ReferenceStep:
    """Records the arguments and the loss of the next ``training_step``.

    Args:
        max_bytes: bound on the size of the batch; a larger one is not recorded.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._undo: Callable[[], None] | None = None
        self.kept: dict[str, Any] | None = None
        """The recorded step, as ``torch.load(weights_only=True)`` accepts it, or None."""
        self.obstacle: str | None = None
        """The reason why no step can be recorded, or None."""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to record the next step."""
        self.cancel()
        self.kept = self.obstacle = None
        if not pl_module.automatic_optimization:
            self.obstacle = (
                "in manual optimization a training_step cannot be run without its update"
            )
            return
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.cancel()
            kept = self._record_inputs(trainer, args, kwargs)
            output = original(*args, **kwargs)
            self._record_loss(kept, output)
            return output

        patch = Patch(pl_module, "training_step", training_step)
        patch.apply()
        self._undo = patch.remove

    def cancel(self) -> None:
        """Stops recording and restores the ``training_step`` of the module."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _record_inputs(self, trainer: Trainer, args: Any, kwargs: Any) -> dict[str, Any] | None:
        extra = [*args[1:], *kwargs.values()]
        if not args or not all(isinstance(x, _PLAIN) for x in extra):
            self.obstacle = "the arguments of training_step are not a batch and its index"
            return None
        self.obstacle = _why_not_storable(args[0], self._max_bytes)
        if self.obstacle is not None:
            return None
        return {
            "batch": _packed(_on_host(args[0])),
            "extra": list(args[1:]),
            "named": dict(kwargs),
            "rng": pack_rng(capture_rng()),
            **_environment(trainer),
        }

    def _record_loss(self, kept: dict[str, Any] | None, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else output
        if kept is None:
            return
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            self.obstacle = "training_step returns no scalar loss"
            return
        self.kept = kept | {"loss": loss.detach().clone()}


def replay_loss(trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Any]) -> float:
    """Returns the loss of the reference step now; generators, buffers and metrics are restored."""
    batch = move_data_to_device(_on_host(_unpacked(kept["batch"])), pl_module.device)
    with isolated_step(trainer, pl_module), torch.no_grad():
        restore_rng(unpack_rng(kept["rng"]))
        output = trainer.strategy.training_step(batch, *kept["extra"], **kept["named"])
    loss = output.get("loss") if isinstance(output, dict) else output
    return float(loss)  # type: ignore[arg-type]


def incomparable(trainer: Trainer, kept: Mapping[str, Any]) -> str | None:
    """Returns why the loss of this trainer cannot be compared with the saved one, or None."""
    try:
        _unpacked(kept["batch"])
    except LookupError as error:
        return str(error)
    now = _environment(trainer)
    changed = [
        f"{name} was {kept[name]}, is {now[name]}" for name in now if kept[name] != now[name]
    ]
    return "; ".join(changed) or None


def same_loss(kept: Mapping[str, Any], loss: float) -> bool:
    """Returns whether two losses differ only by rounding in the precision of the saved step."""
    tolerance = 1e-2 if "16" in kept["precision"] else 1e-4
    return math.isclose(float(kept["loss"]), loss, rel_tol=tolerance, abs_tol=1e-7)


def same_batch(a: Any, b: Any) -> bool:
    """Returns whether two batches are equal in every element; NaN equals NaN.

    >>> same_batch([torch.tensor([float("nan")]), "x"], [torch.tensor([float("nan")]), "x"])
    True
    >>> same_batch({"x": torch.zeros(2)}, {"x": torch.zeros(3)})
    False
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = b.detach().to(a.device)
        same_type = a.shape == b.shape and a.dtype == b.dtype
        return same_type and bool(((a == b) | ((a != a) & (b != b))).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_batch(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_batch, a, b))
    return bool(a == b)


def _environment(trainer: Trainer) -> dict[str, str]:
    return {
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
    }


def _why_not_storable(value: Any, max_bytes: int) -> str | None:
    """Returns why a batch cannot be stored in a checkpoint, or None."""
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
            return f"the batch contains a {type(item).__name__}, which a checkpoint cannot store"
    return f"the batch takes {total} bytes, more than {max_bytes}" if total > max_bytes else None


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
    """Returns a batch with named tuples converted to dicts, which a checkpoint can store."""
    if _is_named(value):
        kind = type(value)
        fields = {name: _packed(getattr(value, name)) for name in value._fields}
        return {_NAMED: f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    if isinstance(value, dict):
        return type(value)((key, _packed(item)) for key, item in value.items())
    return type(value)(map(_packed, value)) if isinstance(value, (list, tuple)) else value


def _unpacked(value: Any) -> Any:
    """Returns a packed batch with its named tuples restored.

    Raises:
        LookupError: if no loaded module has the class; no module is imported for it.
    """
    if isinstance(value, dict) and _NAMED in value:
        fields = {name: _unpacked(item) for name, item in value["fields"].items()}
        return _named_tuple_class(value[_NAMED], tuple(fields))(**fields)
    if isinstance(value, dict):
        return type(value)((key, _unpacked(item)) for key, item in value.items())
    return type(value)(map(_unpacked, value)) if isinstance(value, (list, tuple)) else value


def _named_tuple_class(name: str, fields: tuple[str, ...]) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, tuple)):
        raise LookupError(f"the batch was a {path}, which {module} no longer defines")
    if getattr(found, "_fields", None) != fields:
        raise LookupError(f"the batch was a {path} with fields {fields}, now it has other fields")
    return found
