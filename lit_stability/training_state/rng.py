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


def capture_rng() -> dict[str, Any]:
    """Returns the RNG states of python, numpy, torch and every accelerator in use."""
    accelerator = _accelerator()
    return {
        "python": _python.state(),
        "numpy": _numpy.state(),
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


class _NumpyGenerator:
    """Reads the state of numpy's generator and caches it."""

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._state: Any = None

    def state(self) -> Any:
        """Returns the same as ``np.random.get_state``, from a cache if it is still valid.

        ``get_state`` boxes every word, which takes 30 to 80 microseconds. The cached state is valid
        while the generator's memory is unchanged. A state with a stored second Gaussian number is
        never cached, because that number is outside this memory.
        """
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(generator, np.random.MT19937):
            return np.random.get_state(legacy=False)
        address: int = generator.ctypes.state_address
        memory = ctypes.string_at(address, 4 * (_WORDS + 1))
        if memory != self._memory:
            _, words, position, has_gauss, _ = self._state = np.random.get_state()
            known = memory == np.append(words, np.uint32(position)).tobytes()
            self._memory = memory if known and not has_gauss else None
        return self._state


_numpy = _NumpyGenerator()


class _PythonGenerator:
    """Reads the state of Python's generator and caches it.

    ``random.getstate`` makes a tuple of 625 numbers, ten times as long as comparing their memory
    takes. In CPython a generator's memory is an object header, its position and its words; the
    first state that is read shows whether that is so, and if not, nothing is cached.
    """

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._state: Any = None

    def state(self) -> Any:
        """Returns the same as ``random.getstate``, from a cache if it is still valid."""
        generator = getattr(random.getstate, "__self__", None)
        if type(generator) is not random.Random:
            return random.getstate()
        memory = ctypes.string_at(id(generator) + object.__basicsize__, 4 * (1 + _WORDS))
        if memory != self._memory:
            self._state = random.getstate()
            *words, position = self._state[1]
            known = memory == np.array([position, *words], dtype=np.uint32).tobytes()
            self._memory = memory if known else None
        version, words, _ = self._state
        return version, words, generator.gauss_next  # type: ignore[attr-defined]


_python = _PythonGenerator()


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
