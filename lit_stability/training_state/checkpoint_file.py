"""Checks that a checkpoint file is whole: complete, and without a flipped bit.

``torch.load`` does not compare checksums: a flipped bit in a tensor is loaded as another number.
Imports neither torch nor Lightning.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

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
        files: in order of preference. Folders, as sharded checkpoints are, count as whole.
    """
    for file in files:
        damage = None if file.is_dir() else damage_of(file)
        if damage is None:
            return file
        log.warning("%s is ignored: %s", file, damage)
    return None


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Reads a member to its end, where its checksum is compared.

    Raises:
        zipfile.BadZipFile: if the checksum differs.
    """
    with archive.open(member) as content:
        while content.read(_CHUNK):
            pass
