"""Keeps values of environment variables out of what is written.

A config may take a password from the environment: `${oc.env:DB_PASSWORD}`. The objects of the run
get its value; files get the expression again. Imports nothing but the standard library.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

_LONG = 8
"""Shortest value that is replaced inside of texts: a shorter one, such as "adam", may be part of
any word."""

_expressions: dict[str, str] = {}
"""Value -> the expression that it came from, in this process."""


def keep_out(values: Mapping[str, str]) -> None:
    """Has values replaced from now on wherever something is written.

    Args:
        values: value -> the expression to write instead.
    """
    _expressions.update({value: text for value, text in values.items() if value})


def kept_out() -> dict[str, str]:
    """Returns the values that are replaced, with their expressions."""
    return dict(_expressions)


def redacted(text: str) -> str:
    """Returns a text in which every long value is replaced; an absolute path is no secret.

    >>> keep_out({"hunter2-secret": "${oc.env:PASSWORD}"})
    >>> redacted("401 for hunter2-secret")
    '401 for ${oc.env:PASSWORD}'
    """
    for value in sorted(_expressions, key=len, reverse=True):
        if len(value) >= _LONG and not os.path.isabs(value) and value in text:
            text = text.replace(value, _expressions[value])
    return text


def redacted_tree(value: Any, *, options: bool = False) -> Any:
    """Returns nested values in which texts are `redacted`.

    Containers are copied, other objects are returned as they are.

    Args:
        value: of any type.
        options: whether these are options of the config, where a text that is equal to a value is
            that value, however short.

    >>> keep_out({"s3cret": "${oc.env:KEY}"})
    >>> redacted_tree({"key": "s3cret", "sizes": [1, 2]}, options=True)
    {'key': '${oc.env:KEY}', 'sizes': [1, 2]}
    """
    if not _expressions:
        return value
    if isinstance(value, str):
        return _expressions.get(value, redacted(value)) if options else redacted(value)
    if isinstance(value, MutableMapping):
        other = copy.copy(value)
        for key, each in value.items():
            other[key] = redacted_tree(each, options=options)
        return other
    if type(value) in (list, tuple):
        return type(value)(redacted_tree(each, options=options) for each in value)
    return value
