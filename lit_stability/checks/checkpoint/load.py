"""Loading a checkpoint for study: tensors and plain values alone, and no code that it carries.

May import torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_stability.errors import ConfigError
from lit_stability.measurement.step_stats import GradientDetail
from lit_stability.training_state.good_checkpoints import find_last_good

_RETELL = 300
"""Characters of torch's own message that are passed on."""


def find_file(given: Path) -> Path:
    """The checkpoint that is meant: the file itself, or of a run's folder the last known good.

    Args:
        given: a file, a run's folder, or the folder of an incident.

    Raises:
        ConfigError: if there is none, or it is a folder of shards.
    """
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError(f"{given}: no such file; give a checkpoint, or the folder of a run")
    if (given / ".metadata").exists() or (given / "meta.pt").exists():
        raise ConfigError(
            f"{given}: a checkpoint in shards, of which no part is a whole tensor; put it together "
            f"first: python -m lightning.pytorch.utilities.consolidate_checkpoint {given}"
        )
    if (given / "checkpoint.ckpt").exists() and (given / "scene.pt").exists():
        return find_file(given / "checkpoint.ckpt")
    good = find_last_good(given)
    if good is None:
        raise ConfigError(
            f"{given}: no good checkpoint there; `lit_stability.LastKnownGood` among the callbacks "
            "writes one after some healthy steps. Any other file has to be named"
        )
    return good


def load(file: Path) -> Mapping[str, Any]:
    """Load a checkpoint to the CPU, without running any code that it may carry.

    Args:
        file: written by ``torch.save``; one in its older format is read whole into memory.

    Raises:
        ConfigError: if it is no checkpoint, is cut short, or holds objects that take code to load.
    """
    try:
        loaded = _read(file)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{file}: cannot be loaded with weights_only=True, which admits tensors and plain "
            "values: loading anything else may run code that the file carries, and is not done "
            f"here. {_retold(error)} If you trust the file, load it yourself with "
            "weights_only=False, and save its state_dict and optimizer_states alone"
        ) from error
    except Exception as error:
        # Of bytes that are no pickle the reader raises whatever they happen to lead it to.
        raise ConfigError(
            f"{file}: not a checkpoint, or cut short ({type(error).__name__}: {_retold(error)}); "
            "another one may be whole"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{file}: holds a {type(loaded).__name__}, and no dict of a checkpoint")
    return loaded


def load_gradients(checkpoint: Path) -> tuple[GradientDetail, ...]:
    """Gradients of the offending step, where the file lies in the folder of an incident.

    The scene is left alone, too, where it holds what takes code to load, as a batch may.
    """
    scene = checkpoint.with_name("scene.pt")
    if not scene.is_file():
        return ()
    try:
        with torch.serialization.safe_globals(_arrays()):
            found = torch.load(scene, weights_only=True, map_location="cpu")
        return tuple(GradientDetail(**each) for each in found["gradients"])
    except Exception:
        return ()


def _read(file: Path) -> Any:
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(file, weights_only=True, map_location="cpu")


def _arrays() -> list[Any]:
    """What numpy's arrays of plain numbers are made by; the states of generators hold one."""
    import numpy as np

    make = np.zeros(1).__reduce__()[0]
    return [make, np.ndarray, np.dtype, type(np.dtype("uint32"))]


def _retold(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # Torch's own advice, to switch the check off, is not passed on.
    start = text.rfind("WeightsUnpickler error:")
    text = text[start:] if start >= 0 else text
    text = text.split(" Please ")[0].split(" Check the documentation")[0]
    return text if len(text) <= _RETELL else text[:_RETELL] + " ..."
