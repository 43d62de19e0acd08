"""What a corpus is made of: pairs of sentences, in three parts that share nothing."""

from typing import NamedTuple


class Pair(NamedTuple):
    """A classical sentence and its modern rendering."""

    source: str
    target: str


class Splits(NamedTuple):
    """The three parts of a corpus."""

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
