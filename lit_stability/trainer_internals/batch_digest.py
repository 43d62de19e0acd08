"""Tells whether a training step has changed its batch. May import torch but not Lightning."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lit_stability.measurement.tensor_tree import DEEPEST, PLAIN_TYPES, parts_of

_SAMPLED = 2**16
"""Bytes of an array that are read. Augmentation in place changes nearly all of them."""


def digest_of(batch: Any) -> tuple[Hashable, ...]:
    """Returns values that differ after a change of the batch.

    Seen are writes into tensors, by their version counters; writes into arrays, by a checksum of
    at most 64 KiB; and other objects in a container or an attribute.

    >>> batch = {"x": np.zeros(3), "ids": [1, 2]}
    >>> before = digest_of(batch)
    >>> digest_of(batch) == before
    True
    >>> batch["x"] += 1
    >>> digest_of(batch) == before
    False
    """
    leaves: list[Hashable] = []
    _add_leaves(batch, 0, leaves)
    return tuple(leaves)


def _add_leaves(value: Any, depth: int, leaves: list[Hashable]) -> None:
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        leaves.append((id(value), version, value.shape))
    elif type(value) in PLAIN_TYPES:
        leaves.append(value if value == value else "nan")
    elif isinstance(value, np.ndarray):
        leaves.append((id(value), value.shape, _checksum(value)))
    else:
        leaves.append(id(value))
        if depth >= DEEPEST:
            return
        if type(value) in (list, tuple):
            parts: Iterable[Any] = value
        else:
            # The order or name of an entry may have changed too.
            leaves.extend(value if isinstance(value, Mapping) else ())
            parts = (part for _, part in parts_of(value))
        for part in parts:
            _add_leaves(part, depth + 1, leaves)


def _checksum(array: np.ndarray[Any, Any]) -> int:
    if array.dtype.hasobject:
        return 0
    flat = array.reshape(-1)
    step = max(1, array.nbytes // _SAMPLED)
    return zlib.adler32(flat[::step].tobytes())
