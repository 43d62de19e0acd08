"""Tells whether a training step has changed its batch. May import torch but not Lightning."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lit_stability.measurement.tensor_tree import parts_of

_SAMPLED = 2**16
"""Bytes of an array that are read. Augmentation in place changes nearly all of them."""
_DEEPEST = 8


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
    return tuple(_leaves(batch, 0))


def arrays_size(batch: Any, depth: int = 0) -> int:
    """Returns the size in bytes of the numpy arrays in a batch.

    >>> arrays_size({"x": np.zeros(3), "y": [np.zeros(2)]})
    40
    """
    if isinstance(batch, np.ndarray):
        return batch.nbytes
    if isinstance(batch, Tensor) or depth >= _DEEPEST:
        return 0
    return sum(arrays_size(part, depth + 1) for _, part in parts_of(batch))


def _leaves(value: Any, depth: int) -> Iterator[Hashable]:
    if isinstance(value, Tensor):
        yield (id(value), 0 if value.is_inference() else value._version, tuple(value.shape))
    elif isinstance(value, np.ndarray):
        yield (id(value), value.shape, _checksum(value))
    elif type(value) in (int, float, str, bytes, bool, type(None)):
        yield value if value == value else "nan"
    else:
        yield id(value)
        if depth >= _DEEPEST:
            return
        if type(value) in (list, tuple):
            parts: Iterable[Any] = value
        else:
            yield from _keys(value)
            parts = (part for _, part in parts_of(value))
        for part in parts:
            yield from _leaves(part, depth + 1)


def _keys(value: Any) -> Iterator[Hashable]:
    """The keys of a dict, as the order or name of an entry may have changed."""
    if isinstance(value, Mapping):
        yield from value


def _checksum(array: np.ndarray[Any, Any]) -> int:
    if array.dtype.hasobject:
        return 0
    flat = array.reshape(-1)
    step = max(1, array.nbytes // _SAMPLED)
    return zlib.adler32(flat[::step].tobytes())
