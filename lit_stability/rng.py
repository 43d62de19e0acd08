"""States of the random generators: taken, put back, and packed for a checkpoint.

Packed they are tensors, ints and floats, which ``torch.load(weights_only=True)`` reads back.
May import torch; knows no Lightning.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """States of the generators of python, numpy, torch and every CUDA device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put such states back."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def pack_rng(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what `capture_rng` returned into tensors and plain numbers.

    >>> before = pack_rng(capture_rng())
    >>> first = torch.rand(1).item()
    >>> restore_rng(unpack_rng(before)); torch.rand(1).item() == first
    True
    """
    version, integers, gauss = state["python"]
    kind, words, position, has_gauss, cached = state["numpy"]
    assert kind == "MT19937", "the legacy generator of numpy knows no other"
    return {
        "python": [version, torch.tensor(integers), gauss],
        "numpy": [torch.from_numpy(words.astype(np.int64)), position, has_gauss, cached],
        "torch": state["torch"],
        "cuda": list(state["cuda"]),
    }


def unpack_rng(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Make of them again what `restore_rng` takes; states of devices that are not here are left."""
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
    """Whether nothing was drawn on the host between two captures."""
    return bool(
        torch.equal(a["torch"], b["torch"])
        and a["python"] == b["python"]
        and a["numpy"][2:] == b["numpy"][2:]
        and np.array_equal(a["numpy"][1], b["numpy"][1])
    )


__all__ = ["capture_rng", "pack_rng", "restore_rng", "same_rng", "unpack_rng"]
