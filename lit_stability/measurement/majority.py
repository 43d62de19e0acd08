"""Which of three computations of the same numbers was wrong.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Majority: TypeAlias = Literal["agreed", "training", "rerun", "unreproducible"]
"""Which computation was wrong: none, that of training, one of the two reruns, or unknown."""


def majority(*, first: bool, second: bool, reruns: bool) -> Majority:
    """Returns which computation was wrong, by two out of three.

    Args:
        first: whether training agrees with the first rerun.
        second: whether training agrees with the second rerun.
        reruns: whether the two reruns agree.

    >>> majority(first=False, second=False, reruns=True)
    'training'
    >>> majority(first=False, second=True, reruns=False)
    'rerun'
    >>> majority(first=False, second=False, reruns=False)
    'unreproducible'
    """
    if first and second:
        return "agreed"
    if first or second:
        return "rerun"
    return "training" if reruns else "unreproducible"
