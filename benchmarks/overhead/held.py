"""What a fit reads back to the host, and what memory it holds: counted, not timed."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.byte_gpt import ByteGPTModule
from benchmarks.overhead.suites import Suite
from benchmarks.overhead.turns import Setting, batches_of, make_trainer

READS = ("_local_scalar_dense", "equal", "nonzero")
"""Kernels that wait for their result on the host: ``item``, ``float``, ``bool`` are the first."""


class _HostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count, and go on."""
        self.count += func._schema.name.removeprefix("aten::") in READS
        found = func(*args, **(kwargs or {}))
        # To another device, and to this one: a copy that is waited for.
        if isinstance(found, Tensor) and found.device.type == "cpu":
            self.count += any(isinstance(a, Tensor) and a.device.type != "cpu" for a in args)
        return found


@contextmanager
def host_reads() -> Iterator[_HostReads]:
    """Count what is read back to the host of tensors, on whatever device they are.

    On a CPU ``Tensor.tolist`` and ``Tensor.numpy`` reach no kernel, and are counted as they are
    called.
    """
    reads = _HostReads()

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.count += 1
            return original(tensor, *args, **kwargs)

        return patch.object(Tensor, name, counted)

    with counting("tolist"), counting("numpy"), reads:
        yield reads


@dataclass(frozen=True)
class Held:
    """Of one fit."""

    reads: float
    """Reads of tensors by the host, per step."""
    tensors: int
    """Bytes of all tensors alive at the end of the last step."""
    python: int
    """Bytes of all other objects that were made since the fit began."""


class _Ender(Callback):
    """Counts what is there at the end of a fit's last step."""

    def __init__(self) -> None:
        self.tensors = self.python = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            gc.collect()
            self.tensors = tensor_bytes()
            self.python = tracemalloc.get_traced_memory()[0]


def tensor_bytes() -> int:
    """Bytes of the storages of all tensors alive, each once."""
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        # By its type: some objects warn when they are asked for their class, and subclasses, as
        # torch.compile leaves behind, when they are asked for their memory.
        if type(each) in (Tensor, torch.nn.Parameter) and each.layout is torch.strided:
            try:
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):
                continue  # there is none
    return sum(storages.values())


def held_by(suite: Suite, setting: Setting) -> Held:
    """Fit twice with a suite, counting reads and then bytes: to count one disturbs the other."""
    with host_reads() as reads:
        _fit(suite, setting, _Ender())
    ender = _Ender()
    tracemalloc.start()
    try:
        _fit(suite, setting, ender)
    finally:
        tracemalloc.stop()
    return Held(reads.count / setting.steps, ender.tensors, ender.python)


def _fit(suite: Suite, setting: Setting, ender: _Ender) -> None:
    gc.collect()
    seed_everything(0, verbose=False)
    trainer = make_trainer(suite, setting, [*suite.callbacks(), ender])
    trainer.fit(ByteGPTModule(setting.config), batches_of(setting))
