"""Checks that a checkpoint is whole: complete, and without a flipped bit.

``torch.load`` does not compare checksums: a flipped bit in a tensor is loaded as another number.
In the folder of several ranks each rank lists the files that it wrote, with their checksums.
Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_stability.lightning_choice import suite_logger

log = suite_logger()

_CHUNK = 1 << 20
"""Bytes that are read at once."""


def damage_of(file: Path) -> str | None:
    """Returns what is wrong with a checkpoint file, in words; None if it is whole.

    Reads the whole file, about 3 GB/s from memory. Files written without checksums
    (``torch.serialization.set_crc32_options(False)``) are checked for completeness only.

    Args:
        file: written by ``torch.save``, in its zip format.
    """
    try:
        if not zipfile.is_zipfile(file):
            return "it is truncated, or not a checkpoint"
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if not any(member.filename.endswith("data.pkl") for member in members):
                return "it was not written by torch.save"
            for member in members:
                if member.CRC or not member.file_size:
                    _read(archive, member)
    except Exception as error:  # damaged headers can raise any exception
        return f"it is damaged ({type(error).__name__}: {error})"
    return None


def first_whole(files: Iterable[Path]) -> Path | None:
    """Returns the first checkpoint file that is whole; logs those before it that are not.

    Args:
        files: in order of preference; a folder without lists of files counts as whole.
    """
    for file in files:
        damage = damage_of_folder(file) if file.is_dir() else damage_of(file)
        if damage is None:
            return file
        log.warning("%s is ignored: %s", file, damage)
    return None


def list_files(folder: Path, rank: int, world_size: int, files: Iterable[Path]) -> None:
    """Writes the list of the files that a rank has written to a folder, as ``rank=N.json``.

    Args:
        folder: of the checkpoint.
        rank: of this process.
        world_size: number of ranks; each writes a list.
        files: in the folder; they are read once more, for their checksums.

    Raises:
        OSError: if the list cannot be written or a file not be read.
    """
    sizes = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        for file in files
    }
    content = {"schema": 1, "rank": rank, "world_size": world_size, "files": sizes}
    (folder / f"rank={rank}.json").write_text(json.dumps(content, indent=2) + "\n")


def ranks_in(folder: Path) -> int:
    """Returns the number of ranks that wrote the checkpoint in a folder; 0 if there is no list."""
    first = folder / "rank=0.json"
    return int(json.loads(first.read_text())["world_size"]) if first.exists() else 0


def damage_of_folder(folder: Path) -> str | None:
    """Returns what is wrong with the folder of a checkpoint, in words; None if it is whole.

    Args:
        folder: for which each rank has written a list; without any list it counts as whole.
    """
    try:
        for rank in range(ranks_in(folder)):
            found = json.loads((folder / f"rank={rank}.json").read_text())
            for name, wanted in found["files"].items():
                damage = _difference(folder / name, wanted)
                if damage is not None:
                    return f"{name} {damage}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Exception as error:  # a damaged list can raise any exception
        return f"it is damaged ({type(error).__name__}: {error})"
    return None


def _difference(file: Path, wanted: dict[str, Any]) -> str | None:
    size = file.stat().st_size
    if size != wanted["bytes"]:
        return f"has {size} bytes, {wanted['bytes']} were written"
    return None if _crc32(file) == wanted["crc32"] else "has another checksum than when written"


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Reads a member to its end, where its checksum is compared.

    Raises:
        zipfile.BadZipFile: if the checksum differs.
    """
    with archive.open(member) as content:
        while content.read(_CHUNK):
            pass
