"""Loads a checkpoint for examination: only tensors and plain values, without running its code.

May import torch.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_stability.errors import ConfigError
from lit_stability.lightning_choice import choose_lightning, trainer_module
from lit_stability.measurement.step_stats import GradientDetail
from lit_stability.training_state.checkpoint_file import damage_of
from lit_stability.training_state.good_checkpoints import find_last_good


class NoCheckpointError(ConfigError):
    """Raised for a folder in which there is no checkpoint to examine."""


def find_file(given: Path) -> Path:
    """Returns the checkpoint file for a path: the file itself, or the last known good one of a run.

    Args:
        given: A file, the folder of a run, or the folder of an incident.

    Raises:
        NoCheckpointError: If a folder has no checkpoint.
        ConfigError: If there is no such file, or the path is a sharded checkpoint.
    """
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError(f"{given}: no such file; give a checkpoint, or the folder of a run")
    if (given / ".metadata").exists() or (given / "meta.pt").exists():
        module = trainer_module(choose_lightning())
        raise ConfigError(
            f"{given}: is a sharded checkpoint, which cannot be examined; consolidate it first: "
            f"python -m {module}.utilities.consolidate_checkpoint {given}"
        )
    if (given / "checkpoint.ckpt").exists() and (given / "scene.pt").exists():
        return find_file(given / "checkpoint.ckpt")
    good = find_last_good(given)
    if good is None:
        raise NoCheckpointError(
            f"{given}: contains no known good checkpoint; give the path of a checkpoint file, or "
            "train with the callback `lit_stability.LastKnownGood`, which writes one"
        )
    return find_file(good)


def load(file: Path) -> Mapping[str, Any]:
    """Loads a checkpoint to the CPU, without running any code that it may contain.

    Args:
        file: Written by ``torch.save``; a file in its legacy format is read into memory as a whole.

    Raises:
        ConfigError: If it is no checkpoint, is truncated, or contains objects that need code to
            load.
    """
    try:
        loaded = _read(file)
    except pickle.UnpicklingError as error:
        damage = wrong_checksum(file)
        if damage is not None:
            raise ConfigError(f"{file}: {damage}; try another checkpoint") from error
        if not zipfile.is_zipfile(file) and "GLOBAL" not in str(error):
            raise ConfigError(_no_checkpoint(file, error)) from error
        raise ConfigError(
            f"{file}: contains more than tensors and plain values; other objects are not loaded, "
            f"because they may run code. {_reason(error)}{_objects(file)} Write it again, in the "
            "program that made it, with only its state_dict and optimizer_states"
        ) from error
    except Exception as error:
        # Bytes that are not a pickle can raise any exception.
        raise ConfigError(_no_checkpoint(file, error)) from error
    if not isinstance(loaded, Mapping):
        kind = type(loaded).__name__
        raise ConfigError(f"{file}: contains the type {kind}; expected the dict of a checkpoint")
    return loaded


def wrong_checksum(file: Path) -> str | None:
    """Returns what of a loaded file is not what was written; None if nothing, or not known.

    Args:
        file: A checkpoint. The legacy format has no checksums.
    """
    return damage_of(file) if zipfile.is_zipfile(file) else None


def load_gradients(checkpoint: Path) -> tuple[GradientDetail, ...]:
    """Returns the gradients of the offending step, if the file is in the folder of an incident.

    Returns no gradients if the incident file contains objects that need code to load, as a batch
    may.
    """
    incident_file = checkpoint.with_name("scene.pt")
    if not incident_file.is_file():
        return ()
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            saved = torch.load(incident_file, weights_only=True, map_location="cpu")
        return tuple(_gradient(gradient) for gradient in saved["gradients"])
    except Exception:
        return ()


def _gradient(saved: Mapping[str, Any]) -> GradientDetail:
    numbers = {key: float(value) for key, value in saved.items() if key != "name"}
    return GradientDetail(name=str(saved["name"]), **numbers)


def _read(file: Path) -> Any:
    with warnings.catch_warnings():
        # Torch asks to report an issue to it; if the file cannot be read, the error says why.
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(file, weights_only=True, map_location="cpu")


def _numpy_types() -> list[Any]:
    """Returns the types that numpy arrays need for loading; random generator states contain one."""
    import numpy as np

    reconstruct = np.zeros(1).__reduce__()[0]
    return [reconstruct, np.ndarray, np.dtype, type(np.dtype("uint32"))]


_ADVICE = re.compile(
    r"\s*(In PyTorch 2\.6, we|Re-running `torch\.load`|Please use `torch\.serialization|"
    r"Please file an issue|Check the documentation of torch\.load)"
)
"""Where torch's own advice starts, which is to load the file without the check."""


def _no_checkpoint(file: Path, error: BaseException) -> str:
    reason = f"{type(error).__name__} {_reason(error)}".strip()
    return f"{file}: is no checkpoint, or is truncated ({reason}); try another checkpoint"


def _reason(error: BaseException) -> str:
    """Returns why torch does not load a file, in full, without its advice.

    Torch wraps the error of its unpickler in a text that begins with the advice.
    """
    inner = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
    text = " ".join(str(inner or error).split())
    advice = _ADVICE.search(text)
    text = (text[: advice.start()] if advice else text).rstrip(".")
    return f"{text}." if text else ""


def _objects(file: Path) -> str:
    """Returns the names of all classes and functions that a file needs; "" if they are unknown."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not a zip file, or a pickle that cannot be parsed
        return ""
    return f" It needs {', '.join(sorted(names))}." if names else ""
