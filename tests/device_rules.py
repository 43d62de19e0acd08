"""What an accelerator would object to, checked on a CPU."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import lit_stability

PACKAGE = str(Path(lit_stability.__file__).parent)
TORCH = str(Path(torch.__file__).parent)

READS = frozenset(
    {"item", "tolist", "numpy", "cpu", "is_nonzero", "equal", "allclose", "nonzero", "argwhere"}
    | {"masked_select", "unique", "unique_consecutive", "_unique2", "bincount", "__reduce_ex__"}
    | {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "__contains__"}
)
"""Functions that wait until the device has computed what they return."""
MADE_OF_DATA = frozenset({"tensor", "as_tensor", "from_numpy"})


class DeviceRules(TorchFunctionMode):
    """Counts what the package does that an accelerator waits for, or cannot do.

    A tensor counts as one of the device unless it was made on the host: without a device given, by
    a copy to the host, or from such tensors. Device and host are told apart although both are the
    CPU here: ``"cpu"`` and ``cpu()`` mean the host, ``device=other.device`` the device. Calls that
    torch, Lightning or the test make by themselves are not counted.

    Args:
        without_float64: raises where a tensor of the device would be float64, as MPS does.
    """

    def __init__(self, *, without_float64=False):
        super().__init__()
        self.without_float64 = without_float64
        self._host = {}
        self.waits = Counter()
        """Calls for which the host waits for the device, by file, function and torch function."""
        self.mixed = Counter()
        """Operations on tensors of both, by the same."""

    def _mark(self, tensor):
        key = id(tensor)
        self._host[key] = weakref.ref(tensor, lambda _, key=key: self._host.pop(key, None))

    def _is_on_host(self, tensor):
        found = self._host.get(id(tensor))
        return found is not None and found() is tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = [t for t in tensors if not self._is_on_host(t)]
        host = [t for t in tensors if self._is_on_host(t)]
        moved_to = target(name, args, kwargs, self._is_on_host)
        waits = (
            (bool(device) and name in READS)
            or (bool(device) and moved_to == "host")
            or (bool(host) and moved_to == "device")
            or (name in MADE_OF_DATA and moved_to == "device")
            or (bool(device) and indexes_by_mask(name, args))
        )
        self._count(self.waits, name, waits)
        copies = moved_to is not None or name.endswith(("copy_", "_like"))
        vectors = [t for t in host if t.dim()]
        self._count(self.mixed, name, bool(device and vectors) and not copies)
        result = func(*args, **kwargs)
        to_host = moved_to == "host" or name == "cpu" or kwargs.get("device") == "cpu"
        if (to_host or moved_to == "device") and not name.endswith("copy_"):
            # On a CPU such a copy returns the tensor itself.
            result = result.clone() if any(result is t for t in tensors) else result
        made_there = not tensors and kwargs.get("device") is not None
        if not to_host and (moved_to == "device" or device or made_there):
            self._refuse_float64(name, result)
            return result
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._mark(each)
        return result

    def _count(self, counter, name, found):
        place = caller() if found else None
        if place is not None:
            counter[(*place, name)] += 1

    def _refuse_float64(self, name, result):
        wide = (torch.float64, torch.complex128)
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype in wide]
        if self.without_float64 and found and caller() is not None:
            raise TypeError(f"{name}: the device has no float64")


def target(name, args, kwargs, is_on_host):
    """Where a call copies a tensor to: "host", "device" or, if it copies nothing, None."""
    if name in ("copy_", "_foreach_copy_"):
        several = name != "copy_"
        pairs = zip(*args[:2], strict=True) if several else [args[:2]]
        across = [is_on_host(to) for to, of in pairs if is_on_host(to) != is_on_host(of)]
        return None if not across else "host" if across[0] else "device"
    if name not in ("to", *MADE_OF_DATA):
        return None
    wanted = [kwargs.get("device"), *args[1:2]]
    devices = [w for w in wanted if isinstance(w, (str, torch.device))]
    if not devices:
        return None
    return "host" if devices[0] == "cpu" and isinstance(devices[0], str) else "device"


def indexes_by_mask(name, args):
    """Whether the result of an index has as many elements as a mask has true ones."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1]))


def caller():
    """File and function in the package that made the present call, or None if none did."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            return path[len(PACKAGE) + 1 :], frame.f_code.co_name
        if not path.startswith(TORCH) and path != __file__:
            return None
        frame = frame.f_back
    return None
