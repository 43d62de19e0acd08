"""Options that were renamed: the old name still works for one release, with a warning.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates an ``__init__`` so that it takes old names of options too.

    Args:
        names: old name -> new name.

    Raises:
        TypeError: at a call, if an option is given under both names.

    >>> class Rollback:
    ...     @renamed(data="after_rollback")
    ...     def __init__(self, *, after_rollback: str = "replay") -> None:
    ...         self.after_rollback = after_rollback
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     print(Rollback(data="skip").after_rollback, "|", caught[0].message)
    skip | Rollback: data was renamed to after_rollback; the old name goes in 0.3
    """

    def decorate(init: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(init)
        def wrapped(*args: P.args, **options: P.kwargs) -> T:
            for old in names.keys() & options.keys():
                new, owner = names[old], type(args[0]).__name__
                if new in options:
                    raise TypeError(f"{owner} got {old} and {new}, which are the same: keep {new}")
                warnings.warn(
                    f"{owner}: {old} was renamed to {new}; the old name goes in 0.3",
                    FutureWarning,
                    stacklevel=2,
                )
                options[new] = options.pop(old)
            return init(*args, **options)

        return wrapped

    return decorate
