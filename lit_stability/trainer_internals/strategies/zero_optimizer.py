"""DeepSpeed's ZeRO optimizer as the rest of the package knows optimizers.

Stages 1 to 3 keep the weights in fp32 in flat tensors, of which each rank has a part, and free
the gradients of the module's parameters. So an optimizer of ours stands in for DeepSpeed's: its
parameters are views of this rank's part of each weight, with the gradients that DeepSpeed has
averaged, and its step is DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.trainer_internals.patch import Patch


@dataclass
class _Part:
    """This rank's part of one parameter."""

    name: str
    tensor: nn.Parameter
    """A view of the part in `flat`, which may be empty."""
    flat: Tensor
    """Parameter of the optimizer that DeepSpeed steps."""
    start: int
    """Of the part in `flat`."""
    gradient: Callable[[], Tensor]
    """Returns the part of the gradient that DeepSpeed holds, times the loss scale."""
    written: int = 0
    """Version of the gradient when it was read."""
    state: dict[str, Any] = field(default_factory=dict)
    """The optimizer's state of the part, as views."""
    sources: list[int] = field(default_factory=list)
    """Ids of the flat tensors that `state` was made from."""


class ZeroOptimizer(Optimizer):
    """Stands in for DeepSpeed's optimizer of stage 1, 2 or 3.

    Args:
        zero: DeepSpeed's optimizer.
        named: name and parameter of the module's parameters.
    """

    def __init__(self, zero: Any, named: list[tuple[str, nn.Parameter]]) -> None:
        self.zero = zero
        self._step_of_zero = zero.step
        names = {id(parameter): name for name, parameter in named}
        parts = _parts_of_stage_3 if hasattr(zero, "fp16_groups") else _parts_of_stages_1_and_2
        groups = [list(group) for group in parts(zero, names)]
        self.parts = [part for group in groups for part in group]
        """The same parameters in the same order on all ranks."""
        super().__init__([{"params": [part.tensor for part in group]} for group in groups], {})
        of_zero = zero.optimizer.param_groups
        pairs = zip(self.param_groups, of_zero, strict=True)
        linked: list[Any] = [_Group(own["params"], theirs) for own, theirs in pairs]
        self.param_groups = linked
        self.state = _State(self)  # type: ignore[assignment]
        self._has_read = False
        self._patch = Patch(zero, "step", self.step)

    def __getattr__(self, name: str) -> Any:
        """What this class lacks, such as the loss scale, is DeepSpeed's."""
        if name == "zero":
            raise AttributeError(name)
        return getattr(self.zero, name)

    @property
    def flats(self) -> list[Tensor]:
        """The tensors that hold this rank's weights in fp32."""
        return list(dict.fromkeys(part.flat for part in self.parts))

    def attach(self) -> None:
        """Has DeepSpeed's engine step this optimizer."""
        self._patch.apply()

    def detach(self) -> None:
        """Leaves the step to DeepSpeed's optimizer."""
        self._patch.remove()

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Gives each part the gradient that DeepSpeed has averaged, once before each step."""
        if self._has_read:
            return
        self._has_read = True
        scale = float(self.zero.loss_scale)
        for part in self.parts:
            held = part.gradient().view(-1)
            plain = scale == 1.0 and held.dtype == part.tensor.dtype
            part.tensor.grad = held if plain else held.to(part.tensor.dtype) / scale
            part.written = part.tensor.grad._version

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes DeepSpeed's step; one whose gradients were removed since they were read is skipped.

        Then the loss scale stays as it is.
        """
        if self._has_read and all(part.tensor.grad is None for part in self.parts):
            self._forget_gradients()
            with self._overflowing():
                return self._step_of_zero()
        scale = float(self.zero.loss_scale)
        for part in self.parts:
            grad = part.tensor.grad
            if grad is not None and grad._version != part.written:
                held = part.gradient().view(-1)
                if held.data_ptr() != grad.data_ptr():
                    held.copy_(grad * scale)
        self._forget_gradients()
        return self._step_of_zero()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, also those that DeepSpeed has not averaged yet."""
        self._forget_gradients()
        self.zero.zero_grad(set_to_none=True)

    def _forget_gradients(self) -> None:
        self._has_read = False
        for part in self.parts:
            part.tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns that of DeepSpeed's optimizer."""
        state: dict[str, Any] = self.zero.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads that of DeepSpeed's optimizer."""
        self.zero.load_state_dict(state_dict)

    @contextmanager
    def _overflowing(self) -> Iterator[None]:
        """Has DeepSpeed take the branch of a step whose gradients have overflowed.

        No other skips a step on all ranks and clears what DeepSpeed has accumulated.
        """
        zero = self.zero

        def overflow(*args: Any, **kwargs: Any) -> bool:
            zero.overflow = True
            return True

        checks = ("check_overflow", "_overflow_check_and_loss_scale_update")
        patches = [Patch(zero, name, overflow) for name in checks if hasattr(zero, name)]
        patches.append(Patch(zero, "_update_scale", lambda *args: None))
        checked = getattr(zero, "check_grad_overflow", None)
        for patch in patches:
            patch.apply()
        zero.check_grad_overflow = True
        try:
            yield
        finally:
            zero.check_grad_overflow = checked
            for patch in patches:
                patch.remove()


class _Group(MutableMapping[str, Any]):
    """A group of DeepSpeed's optimizer, with other parameters."""

    def __init__(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._params, self._group = params, group

    def __getitem__(self, key: str) -> Any:
        return self._params if key == "params" else self._group[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "params":
            self._params = value
        else:
            self._group[key] = value

    def __delitem__(self, key: str) -> None:
        del self._group[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


class _State(MutableMapping[Tensor, dict[str, Any]]):
    """The state of each part, as views of that of the flat tensors."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._parts: dict[Tensor, _Part] = {part.tensor: part for part in optimizer.parts}
        self._flat_state = optimizer.zero.optimizer.state

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        part = self._parts[parameter]
        state = self._flat_state.get(part.flat)
        if not state:
            raise KeyError(parameter)
        sources = [id(value) for value in state.values()]
        if sources != part.sources:
            part.sources = sources
            part.state = {key: _view(value, part) for key, value in state.items()}
        return part.state

    def __setitem__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Moves the state of the flat weights along with that of a part.

        Lightning moves the states of optimizers to the host at the end of a fit.
        """
        flat = self._parts[parameter].flat
        for key, value in self._flat_state[flat].items():
            if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                self._flat_state[flat][key] = value.to(state[key].device)

    def __delitem__(self, parameter: Tensor) -> None:
        raise TypeError("the state is DeepSpeed's")

    def __iter__(self) -> Iterator[Tensor]:
        return (p for p, part in self._parts.items() if self._flat_state.get(part.flat))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _view(value: Any, part: _Part) -> Any:
    if isinstance(value, Tensor) and value.shape == part.flat.shape:
        return value.narrow(0, part.start, part.tensor.numel())
    return value


def _part(name: str, flat: Tensor, start: int, count: int, grad: Callable[[], Tensor]) -> _Part:
    view = flat.detach().narrow(0, start, count)
    return _Part(name, nn.Parameter(view), flat, start, grad)


def _parts_of_stages_1_and_2(zero: Any, names: dict[int, str]) -> Iterator[Iterator[_Part]]:
    flats = zero.single_partition_of_fp32_groups
    for flat, parameters in zip(flats, zero.bit16_groups, strict=True):
        yield (_mapped_part(names[id(p)], p, flat, zero.cpu_offload) for p in parameters)


def _mapped_part(name: str, parameter: Any, flat: Tensor, offloaded: bool) -> _Part:
    mapping = parameter._hp_mapping
    if mapping is None:
        return _part(name, flat, 0, 0, lambda: flat.detach()[:0])
    address = mapping.hp_fragment_address
    index = parameter._index_in_param_group

    def gradient() -> Tensor:
        if offloaded:
            assert flat.grad is not None, "DeepSpeed keeps one buffer for it"
            return flat.grad.narrow(0, address.start, address.numel)
        held: Tensor = mapping.get_lp_grad_fragment(index)
        return held

    return _part(name, flat, address.start, address.numel, gradient)


def _parts_of_stage_3(zero: Any, names: dict[int, str]) -> Iterator[Iterator[_Part]]:
    groups: dict[int, list[_Part]] = {i: [] for i in range(len(zero.optimizer.param_groups))}
    for sub_group, parameters in enumerate(zero.fp16_groups):
        group = groups[zero.sub_group_to_group_id[sub_group]]
        group += [_padded_part(zero, names[id(p)], p) for p in parameters]
    yield from map(iter, groups.values())


def _padded_part(zero: Any, name: str, parameter: Any) -> _Part:
    """The last part of a parameter is filled up to the size of the others."""
    group, start, size = zero.grad_position[zero.get_param_id(parameter)]
    rank = torch.distributed.get_rank(zero.dp_process_group)
    count = min(size, max(0, parameter.ds_numel - rank * size))

    def gradient() -> Tensor:
        held: Tensor = zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)[0]
        return held[:count]

    return _part(name, zero.fp32_partitioned_groups_flat[group], start, count, gradient)
