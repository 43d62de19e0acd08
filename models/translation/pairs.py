"""Sentence pairs and their three splits."""

from typing import NamedTuple


class Pair(NamedTuple):
    """A Classical Chinese sentence and its modern Chinese translation."""

    source: str
    target: str


class Splits(NamedTuple):
    """Training, validation and test pairs."""

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
