"""Generates English and Chinese sentence prefixes and their continuation, a word or a number.

The sentences come from templates. Some target numbers occur in the sentence itself and must be
copied; a price must be known; a word never depends on a number. Imports only the standard library.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from models.causal.facts import CAPITAL, COLOUR, NAMES, OPPOSITE, PRICE

Language = Literal["en", "zh"]
Unusual = Literal["zero", "negative", "extreme", "missing"]
Slots = Mapping[str, str | float]


@dataclass(frozen=True)
class Sentence:
    """A sentence prefix and its continuation."""

    pieces: tuple[str | float, ...]
    """Text and numbers of the prefix, in order; a missing number is NaN."""
    target: str | float
    """The next word, with a leading space in English, or the next number."""
    space: str = ""
    """Separator before a number; it belongs to the number, not to the text before it."""

    @property
    def prefix(self) -> str:
        """The prefix as text, with numbers written as digits."""
        return "".join(self._text(piece) for piece in self.pieces)

    @property
    def continuation(self) -> str:
        """The target as text, with a number written as digits."""
        return self._text(self.target)

    def _text(self, piece: str | float) -> str:
        if isinstance(piece, str):
            return piece
        return self.space + ("?" if math.isnan(piece) else f"{piece:g}")


@dataclass(frozen=True)
class Template:
    """A text with slots, and a function from the slots to the target."""

    text: str
    answer: Callable[[Slots], str | float]


def _same(slots: Slots) -> str | float:
    return slots["a"]


def _twice(slots: Slots) -> str | float:
    return 2 * float(slots["a"])


_SPACE = {"en": " ", "zh": ""}
_NUMBER = {
    "en": (
        Template("{who} paid {a} yuan for the {goods}, and {other} paid the same,", _same),
        Template("Today it is {a} degrees, and tomorrow the same,", _same),
        Template("{who} has {a} coins and {other} has twice as many,", _twice),
        Template("The usual price of a {goods}, in yuan, is", lambda s: s["price"]),
    ),
    "zh": (
        Template("{who}买{goods}花了{a}元，{other}花得一样多，是", _same),
        Template("今天气温{a}度，明天也一样，是", _same),
        Template("{who}有{a}枚硬币，{other}的是两倍，有", _twice),
        Template("一个{goods}平常的价钱是", lambda s: s["price"]),
    ),
}
_WORD = {
    "en": (
        Template("The colour of {thing} is", lambda s: s["colour"]),
        Template("{who} lives in {country}, in its capital", lambda s: s["capital"]),
        Template("After {a} days {who} saw that the opposite of {quality} is", lambda s: s["not"]),
        Template("In {a} seconds {who} named the colour of {thing},", lambda s: s["colour"]),
    ),
    "zh": (
        Template("{thing}的颜色是", lambda s: s["colour"]),
        Template("{who}住在{country}，首都是", lambda s: s["capital"]),
        Template("过了{a}天，{who}明白{quality}的反面是", lambda s: s["not"]),
        Template("{who}想了{a}秒，说出{thing}的颜色，是", lambda s: s["colour"]),
    ),
}


@dataclass(frozen=True, kw_only=True)
class SentenceSource:
    """Draws random sentences; equal seeds give equal sentences.

    Raises:
        ValueError: An option is out of range.
    """

    languages: Sequence[Language] = ("en", "zh")
    numbers: float = 0.5
    """Share of the sentences that continue with a number."""
    unusual: Sequence[Unusual] = ()
    """Kinds of numbers that replace ordinary ones: `zero`; `negative`; `extreme`, of magnitude
    1e6 to 1e30; `missing`, which is NaN."""
    share: float = 0.1
    """Share of the drawn numbers that are unusual, if `unusual` is not empty."""

    def __post_init__(self) -> None:
        for name, value in (("numbers", self.numbers), ("share", self.share)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value} must be a share, from 0 to 1")
        for name, known in (("languages", {"en", "zh"}), ("unusual", set(_UNUSUAL))):
            if unknown := set(getattr(self, name)) - known:
                raise ValueError(f"{name}={sorted(unknown)}: choose from {sorted(known)}")
        if not self.languages:
            raise ValueError("languages=[] is empty; give 'en', 'zh' or both")

    def draw(self, seed: int | str) -> Iterator[Sentence]:
        """Yields an endless sequence of sentences."""
        rng = random.Random(seed)
        while True:
            yield self._draw_one(rng)

    def _draw_one(self, rng: random.Random) -> Sentence:
        language = rng.choice(list(self.languages))
        templates = _NUMBER if rng.random() < self.numbers else _WORD
        template = rng.choice(templates[language])
        slots = self._fill(language, rng)
        target = template.answer(slots)
        space = _SPACE[language]
        target = target if isinstance(target, float) else space + target
        return Sentence(_pieces(template.text, slots), target, space)

    def _fill(self, language: Language, rng: random.Random) -> dict[str, str | float]:
        who, other = rng.sample(NAMES[language], 2)
        thing, colour = rng.choice(list(COLOUR[language].items()))
        country, capital = rng.choice(list(CAPITAL[language].items()))
        quality, opposite = rng.choice(list(OPPOSITE[language].items()))
        goods, price = rng.choice(list(PRICE[language].items()))
        return {
            **{"who": who, "other": other, "thing": thing, "colour": colour, "country": country},
            **{"capital": capital, "quality": quality, "not": opposite, "goods": goods},
            "price": self._number(rng, float(f"{float(price) * rng.uniform(0.8, 1.2):.2g}")),
            "a": self._number(rng, float(f"{10 ** rng.uniform(0, 2):.2g}")),
        }

    def _number(self, rng: random.Random, ordinary: float) -> float:
        if not self.unusual or rng.random() >= self.share:
            return ordinary
        return _UNUSUAL[rng.choice(list(self.unusual))](ordinary, rng)


_UNUSUAL: dict[str, Callable[[float, random.Random], float]] = {
    "zero": lambda ordinary, rng: 0.0,
    "negative": lambda ordinary, rng: -ordinary,
    "extreme": lambda ordinary, rng: rng.choice((-1.0, 1.0)) * 10 ** rng.uniform(6, 30),
    "missing": lambda ordinary, rng: math.nan,
}


def _pieces(text: str, slots: Slots) -> tuple[str | float, ...]:
    """Fills the slots of a text and keeps its number as a float.

    >>> _pieces("{who} has {a} coins", {"who": "Emma", "a": 3.0})
    ('Emma has', 3.0, ' coins')
    """
    before, mark, after = text.partition("{a}")
    texts = [part.format_map(slots) for part in (before.rstrip(" "), after)]
    pieces = (texts[0], slots["a"], texts[1]) if mark else (texts[0],)
    return tuple(piece for piece in pieces if piece != "")
