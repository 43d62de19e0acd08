"""Captures and restores the states of the random generators, and packs them for a checkpoint.

Packed states consist of tensors, ints and floats, which ``torch.load(weights_only=True)`` accepts.
May import torch, but not Lightning.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

_WORDS = 624
"""Number of 32-bit words in a Mersenne Twister; numpy stores its position, an int, after them."""


def capture_rng() -> dict[str, Any]:
    """Returns the RNG states of python, numpy, torch and every CUDA device."""
    return {
        "python": random.getstate(),
        "numpy": _numpy.state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _has_cuda() else [],
    }


@cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()


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


def restore_rng(state: dict[str, Any]) -> None:
    """Restores states that `capture_rng` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


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
    return {
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed).get_state(),
        "torch": generator.manual_seed(seed).get_state(),
        "cuda": [
            torch.Generator(torch.device("cuda", i)).manual_seed(seed).get_state()
            for i in range(len(state["cuda"]))
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
        "cuda": list(state["cuda"]),
    }


def unpack_rng(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Converts packed states back for `restore_rng`.

    CUDA states are dropped if the number of devices differs.
    """
    version, integers, gauss = packed["python"]
    words, position, has_gauss, cached = packed["numpy"]
    cuda = packed["cuda"]
    return {
        "python": (version, tuple(integers.tolist()), gauss),
        "numpy": ("MT19937", words.numpy().astype(np.uint32), position, has_gauss, cached),
        "torch": packed["torch"].cpu(),
        "cuda": [s.cpu() for s in cuda] if len(cuda) == torch.cuda.device_count() else [],
    }


def same_rng(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Returns whether no random number was drawn on the host between two captures."""
    return bool(
        torch.equal(a["torch"], b["torch"])
        and a["python"] == b["python"]
        and a["numpy"][2:] == b["numpy"][2:]
        and np.array_equal(a["numpy"][1], b["numpy"][1])
    )


__all__ = ["capture_rng", "fresh_rng", "pack_rng", "restore_rng", "same_rng", "unpack_rng"]
