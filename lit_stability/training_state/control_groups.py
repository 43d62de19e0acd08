"""Reads how much memory the control groups of this process leave it, as in a container or a job.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Files:
    """Names of the files of a version of control groups."""

    mounts: tuple[str, ...]
    """Folders at which the groups of this version are found."""
    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    """Row of ``memory.stat`` with the file cache that the kernel drops when memory is short."""


_VERSION_2 = _Files(
    ("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    ("memory.max", "memory.high"),
    "memory.current",
    "inactive_file",
)
_VERSION_1 = _Files(
    ("sys/fs/cgroup/memory",),
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
)


def free_in_groups(root: Path = Path("/")) -> list[int]:
    """Returns the bytes that are left below each limit that applies to this process.

    A limit may be set on the group of the process or on any of its ancestors: batch systems such
    as SLURM set it on the job, and run each task in a group inside of it. File cache that the
    kernel can drop counts as free.

    Args:
        root: folder that holds ``proc`` and ``sys``.

    >>> free_in_groups(Path("/does/not/exist"))
    []
    """
    return [
        left
        for files, path in _memberships(root)
        for mount in files.mounts
        for folder in _with_ancestors(root / mount, path)
        for left in _left_in(folder, files)
    ]


def _memberships(root: Path) -> Iterator[tuple[_Files, str]]:
    """Yields the groups of this process that may limit its memory.

    A row is ``0::/path`` in version 2, and ``4:memory:/path`` in version 1.
    """
    for line in lines_of(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield _VERSION_2, path
        elif "memory" in controllers.split(","):
            yield _VERSION_1, path


def _with_ancestors(mount: Path, path: str) -> Iterator[Path]:
    """Yields the folders of a group and of all its ancestors.

    Inside a container only the last of them may exist: the container's own group is mounted there.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _left_in(folder: Path, files: _Files) -> Iterator[int]:
    usage = _number(folder / files.usage)
    if usage is None:
        return
    rows = dict(line.split(" ", 1) for line in lines_of(folder / "memory.stat") if " " in line)
    cache = rows.get(files.reclaimable, "0")
    used = usage - int(cache if cache.isdigit() else 0)
    for name in files.limits:
        limit = _number(folder / name)  # "max" where there is none
        if limit is not None:
            yield max(0, limit - used)


def _number(path: Path) -> int | None:
    text = "".join(lines_of(path)).strip()
    return int(text) if text.isdigit() else None


def lines_of(path: Path) -> list[str]:
    """Returns the lines of a file of the system; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
