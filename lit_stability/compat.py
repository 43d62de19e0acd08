"""What older versions of Python and torch lack: one name for each difference.

Each names the version that lacks it. May import torch, but not Lightning.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stability.lightning_choice import suite_logger

log = suite_logger()


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an exception, which Python prints below its message.

    Python 3.10 knows no notes: there the note is logged, and kept in ``__notes__`` all the same.

    >>> error = ValueError("a bug")
    >>> add_note(error, "it is deterministic")
    >>> error.__notes__
    ['it is deterministic']
    """
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        vars(error).setdefault("__notes__", []).append(note)
        log.error(note)


def empty_device_cache() -> None:
    """Returns cached blocks of memory to the accelerator; has no effect without one.

    In torch 2.8 only the module of a device, such as ``torch.cuda``, has this function.
    """
    if not torch.accelerator.is_available():
        return
    if hasattr(torch.accelerator, "empty_cache"):
        torch.accelerator.empty_cache()
    else:
        torch.get_device_module().empty_cache()


class CompiledCodeStaysCompiled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Base of a dispatch mode that compiled functions ignore.

    Below any other dispatch mode, the compiler gives up every function that it meets for the first
    time, and that function runs uncompiled from then on, also after the mode has ended.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Returns True."""
        return True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether the mode counts as one of torch's own, which the compiler always ignored.

        Only where torch does not know `ignore_compile_internals`, as 2.8 does not.
        """
        return not hasattr(TorchDispatchMode, "ignore_compile_internals")
