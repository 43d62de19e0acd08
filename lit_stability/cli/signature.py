"""Knows a config that a fit of this user has written from any other.

`lit-stability resume RUN` builds what the config in a run's folder names. A folder that was copied
from somewhere else may hold a config that someone else has written. So a fit writes a signature
next to its config: a keyed hash of its content, with a random key that only this user can read,
outside of all run folders. The folder may be moved; a config that was edited is no longer signed.

The key is in `~/.config/lit-stability/key`, or in the file that the environment variable
`LIT_STABILITY_KEY_FILE` names, which containers and clusters without a common home need. Without a
key nothing is signed, and a resume asks for `--trust`.

Imports only the standard library and the writer of files.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from lit_stability.lightning_choice import suite_logger
from lit_stability.training_state.atomic_write import write_atomically

log = suite_logger()

VARIABLE = "LIT_STABILITY_KEY_FILE"
_BYTES = 32


def sign(config: Path) -> None:
    """Writes the signature of a config next to it.

    Where no key can be created, the reason is logged, and a resume asks for ``--trust``.

    Args:
        config: the file, as written.
    """
    try:
        signature = _signature(config, _create_key())
        target = signature_file(config)
        write_atomically(target, signature.encode(), partial=f".part-{target.name}", private=True)
    except OSError as error:
        log.warning("%s is not signed (%s); a resume will ask for --trust", config, error)


def is_signed(config: Path) -> bool:
    """Returns whether a fit of this user has written a config, and nobody has changed it since.

    Args:
        config: the file.
    """
    try:
        key = _key_file().read_bytes()
        signature = signature_file(config).read_text(encoding="ascii").strip()
        return len(key) >= _BYTES and hmac.compare_digest(signature, _signature(config, key))
    except (OSError, ValueError):
        return False


def signature_file(config: Path) -> Path:
    """Returns the file that holds the signature of a config."""
    return config.with_name(f".{config.name}.signature")


def _signature(config: Path, key: bytes) -> str:
    return hmac.new(key, config.read_bytes(), hashlib.sha256).hexdigest()


def _key_file() -> Path:
    given = os.environ.get(VARIABLE)
    return Path(given) if given else Path.home() / ".config" / "lit-stability" / "key"


def _create_key() -> bytes:
    """Returns the key; creates it if there is none yet.

    Raises:
        OSError: if it can be neither read nor created.
    """
    file = _key_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not file.exists():
        part = file.with_name(f".part-{os.getpid()}-{file.name}")
        write_atomically(
            part, secrets.token_bytes(_BYTES), partial=f"{part.name}.new", private=True
        )
        # Another run may create one at the same time: the first stays.
        with contextlib.suppress(FileExistsError):
            os.link(part, file)
        part.unlink()
    return file.read_bytes()
