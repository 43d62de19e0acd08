"""Writes the checkpoint of several ranks in the background, by all of them or not at all.

May import torch, but not Lightning.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from lit_stability.distributed.collectives import Ranks
from lit_stability.training_state.async_writer import (
    AsyncCheckpointWriter,
    NonFiniteStateError,
    require_finite,
    write_whole,
)
from lit_stability.training_state.atomic_write import flush, why_not_written
from lit_stability.training_state.checkpoint_file import list_files
from lit_stability.training_state.good_checkpoints import MAIN, PART, free_path, prune

T = TypeVar("T")

OF_RANK = "of this rank"
"""Key of a captured checkpoint: what each rank writes for itself."""

FILES = "files of this rank"
"""Key of a captured checkpoint, where each rank writes the files of a library: name -> content."""

_LATEST = "latest"
"""File in which DeepSpeed finds the name of its folder."""

_DCP_INDEX = ".metadata"
"""Name that ``torch.distributed.checkpoint`` gives to its index of all shards."""

_META = "meta.pt"
"""Name that Lightning gives to what is not a tensor in a sharded checkpoint."""


class RankCheckpointWriter(AsyncCheckpointWriter):
    """Writes the folder ``step=N`` together with the other ranks.

    The folder is called ``step=N.part`` until every rank has written its files; rank 0 then renames
    it. Replicas write one file of the weights, `MAIN`, by rank 0. Sharded weights are written by
    all ranks, with ``torch.distributed.checkpoint``, in the format of Lightning's
    ``save_distributed_checkpoint=True``; or, where a checkpoint has `FILES`, in the files of
    DeepSpeed. Each rank adds what only it has, ``rank=N.pt``, and a list
    of its files, ``rank=N.json``. If one rank cannot write, or holds a NaN or Inf, all give up this
    checkpoint, and rank 0 logs it.

    Args:
        folder: where to write, on a file system that all ranks share.
        keep: number of checkpoints to keep.
        ranks: the communicator of the writing threads; no other thread may use it.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        super().__init__(folder, keep, logs=ranks.rank == 0)
        self._ranks = ranks

    def _write_good(self, state: Mapping[str, Any], step: int, constants: Collection[str]) -> None:
        """Writes the checkpoint if it is finite on all ranks.

        Raises:
            NonFiniteStateError: on all ranks, if it is not finite on one.
            OSError: on all ranks, if one cannot write.
        """
        self._together(lambda: require_finite(state, constants))
        path = self._ranks.from_first(free_path(self.folder, step, ending=""))
        self._write_folder(state, path)
        self.newest = path
        if self._ranks.rank == 0:
            prune(self.folder, step, self.keep)

    def write_now(self, state: Mapping[str, Any], path: Path) -> None:
        """Writes a checkpoint that is not called good, while all ranks wait for each other.

        Args:
            state: the checkpoint; not copied.
            path: of the folder, the same on all ranks.

        Raises:
            OSError: on all ranks, if one cannot write.
        """
        self.join()
        self._write_folder(state, path)

    def _write_folder(self, state: Mapping[str, Any], path: Path) -> None:
        part = path.with_name(path.name + PART)
        try:
            self._together(lambda: part.mkdir(parents=True, exist_ok=True))
            written = self._write_weights(state, part)
            self._together(lambda: self._write_own(state[OF_RANK], part, written))
            self._together(lambda: self._publish(part, path))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def _write_weights(self, state: Mapping[str, Any], part: Path) -> list[str]:
        """Writes weights and optimizers; returns patterns of the files that this rank wrote."""
        first = self._ranks.rank == 0
        if FILES in state:
            return self._together(lambda: self._write_files(state[FILES], part)) or []
        common = {key: value for key, value in state.items() if key != OF_RANK}
        if self._ranks.replicas:
            self._together(lambda: write_whole(common, part / MAIN) if first else None)
            return [MAIN] if first else []
        sharded = {"state_dict": common.pop("state_dict")}
        for index, optimizer in enumerate(common.pop("optimizer_states")):
            sharded[f"optimizer_{index}"] = optimizer
        save_shards(sharded, part, self._ranks)
        self._together(lambda: write_whole(common, part / _META) if first else None)
        own = f"__{self._ranks.rank}_*.distcp"
        return [own, _DCP_INDEX, _META] if first else [own]

    def _write_files(self, files: Mapping[str, Any], part: Path) -> list[str]:
        for name, content in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            write_whole(content, part / name)
        if self._ranks.rank:
            return list(files)
        (part / _LATEST).write_text(Path(next(iter(files))).parent.name)
        return [*files, _LATEST]

    def _write_own(self, own: Mapping[str, Any], part: Path, written: list[str]) -> None:
        ranks, file = self._ranks, part / f"rank={self._ranks.rank}.pt"
        write_whole(own, file)
        files = [found for pattern in written for found in part.glob(pattern)]
        list_files(part, ranks.rank, ranks.world, [*files, file])

    def _publish(self, part: Path, path: Path) -> None:
        """Gives the folder its name, on rank 0.

        Raises:
            OSError: if the ranks do not share the folder.
        """
        if self._ranks.rank:
            return
        missing = [r for r in range(self._ranks.world) if not (part / f"rank={r}.json").exists()]
        if missing:
            raise OSError(
                f"the files of ranks {missing} are not in {part} as rank 0 sees it: the run folder "
                "must be on a file system that all ranks share"
            )
        flush(part)
        part.rename(path)
        flush(path.parent)

    def _together(self, action: Callable[[], T]) -> T | None:
        """Runs an action on each rank; raises on all of them if it fails on one."""
        result, error = None, None
        try:
            result = action()
        except Exception as problem:
            error = problem
        text = None if error is None else (type(error).__name__, str(why_not_written(error)))
        found = self._ranks.gather(text)
        failed = [(rank, *each) for rank, each in enumerate(found) if each is not None]
        if failed:
            reason = "; ".join(f"rank {rank}: {message}" for rank, _, message in failed)
            nonfinite = all(kind == NonFiniteStateError.__name__ for _, kind, _ in failed)
            raise (NonFiniteStateError(reason) if nonfinite else OSError(reason)) from error
        return result


def save_shards(state: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Saves sharded tensors with all ranks; raises on all of them if one cannot write.

    Args:
        state: nested dicts with DTensors on the host.
        folder: exists on all ranks.
        ranks: whose group on the host the ranks use, as training goes on with the others.

    Raises:
        OSError: if a rank cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(state, storage_writer=FileSystemWriter(folder), process_group=ranks.host_group)
    except CheckpointException as error:
        failures = {rank: why_not_written(each[0]) for rank, each in error.failures.items()}
        text = "; ".join(f"rank {rank}: {each}" for rank, each in failures.items())
        raise OSError(text) from error


def load_own(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Returns what a rank has written for itself.

    Args:
        checkpoint: folder of a good checkpoint.
        rank: of those that wrote it.

    Raises:
        FileNotFoundError: if there is no such file; the message says what to do.
    """
    file = checkpoint / f"rank={rank}.pt"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist, without which rank {rank} cannot go on where it was: the "
            "folder must be on a file system that all ranks share"
        )
    found: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return found
