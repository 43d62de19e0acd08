"""Captures and restores the states of the random generators, and packs them for a checkpoint.

Packed states consist of tensors, ints and floats, which ``torch.load(weights_only=True)`` accepts.
May import torch, but not Lightning.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORDS = 624
"""Number of 32-bit words in a Mersenne Twister; numpy stores its position, an int, after them."""
_HEADER = object.__basicsize__
"""Bytes of the header of an object in CPython."""


def capture_rng() -> dict[str, Any]:
    """Returns the RNG states of python, numpy, torch and every accelerator in use."""
    accelerator = _accelerator()
    return {
        "python": _python_state(),
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        "accelerator": [] if accelerator is None else accelerator.states(),
    }


@dataclass(frozen=True)
class _Accelerator:
    """The generators of one kind of device."""

    kind: str
    states: Callable[[], list[Tensor]]
    restore: Callable[[list[Tensor]], None]


def _accelerator() -> _Accelerator | None:
    """Returns the kind of device whose generators are in use.

    CUDA is not started for its generators: that would take memory, and forbid forks.
    """
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_initialized():
            return _Accelerator(kind, module.get_rng_state_all, module.set_rng_state_all)
    return _mps() if _has_mps() else None


@cache
def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _mps() -> _Accelerator:
    one = torch.mps
    return _Accelerator("mps", lambda: [one.get_rng_state()], lambda s: one.set_rng_state(s[0]))


class _StateCache:
    """A state that is slow to read, valid while the memory of its generator is unchanged."""

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._state: Any = None

    def state(self, memory: bytes, read: Callable[[], tuple[Any, bytes | None]]) -> Any:
        """Returns the state.

        Args:
            memory: of the generator now.
            read: returns the state, and the memory that belongs to it; None instead of that if
                the memory does not hold the whole state, which is then not cached.
        """
        if memory != self._memory:
            self._state, belongs = read()
            self._memory = memory if memory == belongs else None
        return self._state


_numpy_cache, _python_cache = _StateCache(), _StateCache()


def _numpy_state() -> Any:
    """Returns the same as ``np.random.get_state``, which takes 30 to 80 microseconds."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if not isinstance(generator, np.random.MT19937):
        return np.random.get_state(legacy=False)

    def read() -> tuple[Any, bytes | None]:
        state = np.random.get_state()
        _, words, position, has_gauss, _ = state
        # A second Gaussian number in store is outside of the memory.
        return state, None if has_gauss else np.append(words, np.uint32(position)).tobytes()

    address: int = generator.ctypes.state_address
    return _numpy_cache.state(ctypes.string_at(address, 4 * (_WORDS + 1)), read)


def _python_state() -> Any:
    """Returns the same as ``random.getstate``, which makes a tuple of 625 numbers.

    In CPython a generator's memory is an object header, its position and its words. Where it is
    not, the memory never belongs to the state, and nothing is cached.
    """
    generator = getattr(random.getstate, "__self__", None)
    size = 4 * (1 + _WORDS)
    if type(generator) is not random.Random or _HEADER + size > random.Random.__basicsize__:
        return random.getstate()

    def read() -> tuple[Any, bytes]:
        state = random.getstate()
        *words, position = state[1]
        return state, np.array([position, *words], dtype=np.uint32).tobytes()

    memory = ctypes.string_at(id(generator) + _HEADER, size)
    version, numbers, _ = _python_cache.state(memory, read)
    return version, numbers, generator.gauss_next  # type: ignore[attr-defined]


def restore_rng(state: dict[str, Any]) -> None:
    """Restores states that `capture_rng` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    accelerator = _accelerator()
    if state["accelerator"] and accelerator is not None:
        accelerator.restore(state["accelerator"])


def fresh_rng(state: Mapping[str, Any], salt: int = 0) -> dict[str, Any]:
    """Returns states unrelated to the given ones, which are the same each time.

    Args:
        state: as `capture_rng` returned it.
        salt: another number gives other states.

    >>> state = capture_rng()
    >>> restore_rng(fresh_rng(state)); first = torch.rand(1)
    >>> restore_rng(state); bool(first == torch.rand(1))
    False
    """
    generator = torch.Generator()
    generator.set_state(state["torch"])
    drawn = torch.randint(2**31, (2,), generator=generator).tolist()
    seed = hash((*drawn, salt)) % 2**32
    accelerator = _accelerator()
    kind = "cpu" if accelerator is None else accelerator.kind
    return {
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed).get_state(),
        "torch": generator.manual_seed(seed).get_state(),
        "accelerator": [
            torch.Generator(torch.device(kind, i)).manual_seed(seed).get_state()
            for i in range(len(state["accelerator"]))
        ],
    }


def pack_rng(state: Mapping[str, Any]) -> dict[str, Any]:
    """Converts states from `capture_rng` into tensors and plain numbers.

    >>> before = pack_rng(capture_rng())
    >>> first = torch.rand(1).item()
    >>> restore_rng(unpack_rng(before)); torch.rand(1).item() == first
    True
    """
    version, integers, gauss = state["python"]
    kind, words, position, has_gauss, cached = state["numpy"]
    assert kind == "MT19937", "the only kind that numpy's legacy generator has"
    return {
        "python": [version, torch.tensor(integers), gauss],
        "numpy": [torch.from_numpy(words.astype(np.int64)), position, has_gauss, cached],
        "torch": state["torch"],
        "accelerator": list(state["accelerator"]),
    }


def unpack_rng(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Converts packed states back for `restore_rng`.

    States of accelerators are dropped if the number of devices differs.

    Args:
        packed: as `pack_rng` returned it; version 0.1.0 named the states of accelerators "cuda".
    """
    version, integers, gauss = packed["python"]
    words, position, has_gauss, cached = packed["numpy"]
    states = [s.cpu() for s in packed.get("accelerator", packed.get("cuda", []))]
    accelerator = _accelerator()
    devices = 0 if accelerator is None else len(accelerator.states())
    return {
        "python": (version, tuple(integers.tolist()), gauss),
        "numpy": ("MT19937", words.numpy().astype(np.uint32), position, has_gauss, cached),
        "torch": packed["torch"].cpu(),
        "accelerator": states if len(states) == devices else [],
    }


def same_rng(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Returns whether no random number was drawn between two captures."""
    return bool(
        torch.equal(a["torch"], b["torch"])
        and a["python"] == b["python"]
        and a["numpy"][2:] == b["numpy"][2:]
        and np.array_equal(a["numpy"][1], b["numpy"][1])
        and all(map(torch.equal, a["accelerator"], b["accelerator"]))
    )


__all__ = ["capture_rng", "fresh_rng", "pack_rng", "restore_rng", "same_rng", "unpack_rng"]
