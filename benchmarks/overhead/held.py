"""Counts the tensor reads by the host and the memory of a fit."""

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
from benchmarks.overhead.turns import Setting, make_trainer

READS = ("_local_scalar_dense", "equal", "nonzero")
"""Kernels that wait for a result on the host; ``item``, ``float`` and ``bool`` use the first."""


class _HostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Counts the kernel if it is a read, and runs it."""
        self.count += func._schema.name.removeprefix("aten::") in READS
        result = func(*args, **(kwargs or {}))
        # A copy from another device to the CPU is a read too.
        if isinstance(result, Tensor) and result.device.type == "cpu":
            self.count += any(isinstance(a, Tensor) and a.device.type != "cpu" for a in args)
        return result


@contextmanager
def host_reads() -> Iterator[_HostReads]:
    """Counts the reads of tensors by the host, whatever their device.

    On a CPU ``Tensor.tolist`` and ``Tensor.numpy`` call no kernel, so their calls are counted.
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
class Footprint:
    """Reads and memory of one fit."""

    reads: float
    """Reads of tensors by the host, per step."""
    tensors: int
    """Bytes of all tensors alive at the end of the last step."""
    python: int
    """Bytes of all other objects created since the start of the fit."""


class _MemoryAtEnd(Callback):
    """Measures memory at the end of a fit's last step."""

    def __init__(self) -> None:
        self.tensors = self.python = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            gc.collect()
            self.tensors = tensor_bytes()
            self.python = tracemalloc.get_traced_memory()[0]


def tensor_bytes() -> int:
    """Returns the bytes of the storages of all live tensors, each storage once."""
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        # type() instead of isinstance: some objects warn when their class is read, and tensor
        # subclasses left by torch.compile warn when their storage is read.
        if type(candidate) in (Tensor, torch.nn.Parameter) and candidate.layout is torch.strided:
            try:
                storage = candidate.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):
                continue  # the tensor has no storage
    return sum(storages.values())


def footprint_of(suite: Suite, setting: Setting) -> Footprint:
    """Fits twice with a suite, because counting reads affects the bytes and vice versa."""
    with host_reads() as reads:
        _fit(suite, setting, _MemoryAtEnd())
    memory = _MemoryAtEnd()
    tracemalloc.start()
    try:
        _fit(suite, setting, memory)
    finally:
        tracemalloc.stop()
    return Footprint(reads.count / setting.steps, memory.tensors, memory.python)


def _fit(suite: Suite, setting: Setting, memory: _MemoryAtEnd) -> None:
    gc.collect()
    seed_everything(0, verbose=False)
    trainer = make_trainer(suite, setting, [*suite.callbacks(), memory])
    trainer.fit(ByteGPTModule(setting.config), setting.batches())
