"""Writing a file whole or not at all, and keeping the one that was there.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_and_keep(path: Path, text: str | bytes) -> None:
    """Write a file whole or not at all; a different one there gets the next free number."""
    content = text.encode() if isinstance(text, str) else text
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        number = 1
        while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
