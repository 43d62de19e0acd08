"""Replaces a method of one object, so that copies of the object have the original method."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any


class Patch:
    """A method of one object that calls something else.

    The object pickles and deep-copies as if it had no patch: user code may do either at any time.

    Args:
        owner: the object; `vars` of it holds the patch.
        name: of the method.
        call: what to call instead.

    >>> import copy
    >>> class Greeter:
    ...     def greet(self):
    ...         return "hello"
    >>> greeter = Greeter()
    >>> patch = Patch(greeter, "greet", lambda: "good evening")
    >>> patch.apply()
    >>> greeter.greet(), copy.deepcopy(greeter).greet()
    ('good evening', 'hello')
    >>> patch.remove()
    >>> greeter.greet()
    'hello'
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        self._owner, self._name, self._call = owner, name, call
        self._before = vars(owner).get(name)
        update_wrapper(self, getattr(owner, name), updated=())

    def apply(self) -> None:
        """Replaces the method."""
        vars(self._owner)[self._name] = self

    def remove(self) -> None:
        """Restores what was there before, unless something else has replaced the patch."""
        own = vars(self._owner)
        if own.get(self._name) is not self:
            return
        del own[self._name]
        if self._before is not None:
            own[self._name] = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls what replaces the method."""
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        """The method of the class, which a copy finds as its own state is not there yet."""
        return getattr, (self._owner, self._name)
