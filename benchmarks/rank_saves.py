"""Measures how long a save of several ranks keeps the training waiting.

    python -m benchmarks.rank_saves [--rounds 20] [--quick]

Two processes on this machine, over gloo, one torch thread each, a byte-level Transformer with 9.9M
parameters and AdamW. Every five steps `LastKnownGood` takes a copy that a thread writes, and
``Trainer.save_checkpoint`` saves the same state at once, so that both have the same noise. What is
timed is how long the loop waits, on rank 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from benchmarks.results import Spread, Table, add_options, folder_of, save
from lit_stability import GradientMonitor, LastKnownGood
from lit_stability.training_state.good_checkpoints import FOLDER, good_files

RANKS = 2
EVERY = 5


class Sharded(ByteGPTModule):
    """The model with all its parameters in one group of shards."""

    def configure_model(self) -> None:
        """Shards the model once."""
        if self.device_mesh is not None and not hasattr(self, "sharded"):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


class Timed(LastKnownGood):
    """Times the copies."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=EVERY, confirm_after=1, keep=1)
        self.seconds: list[float] = []
        self._started = 0.0

    def checkpoint(self, trainer: Trainer) -> dict[str, Any]:
        """Starts the clock; it stops when the next batch begins."""
        self._started = time.perf_counter()
        return super().checkpoint(trainer)

    def on_train_batch_start(self, *args: Any) -> None:
        """Stops the clock."""
        if self._started:
            self.seconds.append(time.perf_counter() - self._started)
        self._started = 0.0


class Synchronous(Callback):
    """Saves with the Trainer in the middle between two copies, and times it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, list[float]()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Saves when it is due."""
        if trainer.global_step % EVERY != EVERY // 2:
            return
        trainer.strategy.barrier()
        started = time.perf_counter()
        trainer.save_checkpoint(self.folder / "synchronous.ckpt")
        self.seconds.append(time.perf_counter() - started)


def fit(rank: int, port: int, kind: str, shape: ByteGPTConfig, rounds: int, folder: Path) -> None:
    """Trains on one rank; rank 0 writes what it has timed."""
    os.environ |= {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)},
        **{"NODE_RANK": "0", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    good, whole = Timed(), Synchronous(folder)
    sharded = ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=True)
    trainer = Trainer(
        default_root_dir=folder,
        strategy=DDPStrategy() if kind == "DDP" else sharded,
        devices=RANKS,
        accelerator="cpu",
        max_steps=EVERY * (rounds + 1),
        callbacks=[GradientMonitor(), good, whole],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = ByteGPTModule(shape) if kind == "DDP" else Sharded(shape)
    trainer.fit(module, loader(2, shape.length))
    if rank == 0:
        (path,) = good_files(folder / FOLDER)
        size = sum(file.stat().st_size for file in path.iterdir())
        times = {"copy": good.seconds[1:], "synchronous": whole.seconds[1:], "bytes": size}
        torch.save(times, folder / "times.pt")


def measure(kind: str, shape: ByteGPTConfig, rounds: int) -> dict[str, Any]:
    """Returns the seconds of both kinds of save, and the bytes on disk."""
    folder = Path(tempfile.mkdtemp())
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (port, kind, shape, rounds, folder)
        torch.multiprocessing.spawn(fit, arguments, nprocs=RANKS)
        found: dict[str, Any] = torch.load(folder / "times.pt", weights_only=True)
        return found
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    shape = ByteGPTConfig(width=128, layers=4) if args.quick else ByteGPTConfig(width=400, layers=5)
    figures, rows = {}, []
    for kind in ("DDP", "FSDP2"):
        times = measure(kind, shape, 3 if args.quick else args.rounds)
        copy, whole = Spread.of(times["copy"]), Spread.of(times["synchronous"])
        figures[kind] = {"copy_s": copy, "synchronous_s": whole, "bytes": times["bytes"]}
        size = f"{times['bytes'] / 1e6:.0f}"
        rows.append([kind, size, f"{copy:.3f}", f"{whole:.3f}", f"{copy.count}"])
    columns = ["strategy", "MB on disk", "copied, then written by a thread, s", "saved at once, s"]
    title = "how long a save keeps the loop waiting, with quartiles"
    save("rank_saves", folder_of(args), figures, [Table(title, [*columns, "rounds"], rows)])


if __name__ == "__main__":
    main()
