"""Writes a file completely or not at all.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(
    path: Path,
    content: bytes | Callable[[IO[bytes]], object],
    *,
    partial: str,
    fsync: bool = False,
    private: bool = False,
) -> None:
    """Writes a file completely or not at all; an existing file of that name is replaced.

    The content goes to a partial file in the same folder, which is renamed once it is complete.

    Args:
        path: the file; its folder must exist.
        content: the bytes, or a function that writes them to the open file it is given.
        partial: name of the partial file. A killed process leaves it behind.
        fsync: flush the file to disk before the rename, and the folder after it, so that a power
            failure cannot lose the content.
        private: only the user may read the file (mode 0600), because it may hold secrets.

    Raises:
        OSError: if the file cannot be written. ``path`` is unchanged and the partial file removed.
    """
    part = path.with_name(partial)
    try:
        # A Python file: its writes release the interpreter lock more often than torch's own.
        with open(part, "wb", opener=_private if private else None) as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    if fsync:
        flush(path.parent)


def flush(folder: Path) -> None:
    """Flushes the names in a folder to disk.

    Raises:
        OSError: if they cannot be written.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_not_written(error: BaseException) -> BaseException:
    """Returns the error of the file system behind an exception, or the exception itself.

    ``torch.save`` reports its own state where the disk is full.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found
        found = found.__cause__ or found.__context__
    return error


def _private(path: str, flags: int) -> int:
    """Opens a file that only the user may read; its mode is set before anything is in it."""
    descriptor = os.open(path, flags, 0o600)
    # An old partial file keeps its mode when it is opened. Some file systems have no modes.
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, 0o600)
    return descriptor


def write_and_keep(path: Path, text: str | bytes, *, private: bool = False) -> None:
    """Writes a file completely or not at all, and keeps an existing file with other content.

    The existing file is renamed to the next free number, such as ``report.1.md``. A file with the
    same content is unchanged.

    Args:
        path: the file; its folder is created.
        text: the content; a string is encoded as UTF-8.
        private: only the user may read the file (mode 0600), because it may hold secrets.

    Raises:
        OSError: if the file cannot be written or the existing one not renamed.
    """
    content = text.encode() if isinstance(text, str) else text
    if path.exists() and path.read_bytes() == content:
        if private:
            with contextlib.suppress(OSError):
                path.chmod(0o600)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        number = 1
        while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)
    write_atomically(path, content, partial=f"{path.name}.partial", private=private)
