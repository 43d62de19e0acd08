"""Synchronous grammar that generates Classical Chinese sentences with their translations.

The grammar is small enough to learn in minutes and too large to memorise. The *combination* of a
sentence, its construction and content words, decides its split: no combination of the validation
or test split occurs in training, although every construction and word does. Time phrases are
adjuncts and do not count, so sentences that differ only in them belong to the same split.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Literal

from models.translation.constructions import CONSTRUCTIONS, PHRASES, Rule
from models.translation.lexicon import LEXICON, Word
from models.translation.pairs import Pair, Splits

Split = Literal["train", "val", "test"]
_CHILD = re.compile(r"\{([a-z_]+(?:\.\d)?)\}")
_ADJUNCTS = frozenset({"time"})
_MAX_REPEATS = 1000
"""Consecutive repeated sentences after which the grammar counts as exhausted."""


@dataclass(frozen=True)
class Derivation:
    """A generated sentence pair with its construction and content words."""

    construction: str
    pair: Pair
    content: tuple[str, ...]
    """The Classical Chinese content words without adjuncts, in the order drawn."""

    @property
    def combination(self) -> tuple[str, ...]:
        """Construction and content words, which decide the split."""
        return (self.construction, *self.content)

    def split(self, held_out: float) -> Split:
        """Returns the split of this combination.

        Args:
            held_out: Share of the combinations excluded from training; half of it is `val`.
        """
        digest = blake2b("|".join(self.combination).encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        if share >= held_out:
            return "train"
        return "val" if share < held_out / 2 else "test"


@dataclass
class _Draft:
    """Words chosen so far for one sentence."""

    content: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


class Grammar:
    """Generates sentence pairs from constructions, phrases and a lexicon.

    Raises:
        ValueError: A rule names an unknown word class, or its sides name different children.
    """

    def __init__(
        self,
        constructions: Mapping[str, tuple[Rule, ...]] = CONSTRUCTIONS,
        phrases: Mapping[str, tuple[Rule, ...]] = PHRASES,
        lexicon: Mapping[str, tuple[Word, ...]] = LEXICON,
    ) -> None:
        """Stores the tables and checks that they are consistent."""
        self.constructions = dict(constructions)
        self._phrases = dict(phrases)
        self._lexicon = dict(lexicon)
        for name, rules in {**self.constructions, **self._phrases}.items():
            for rule in rules:
                self._check(name, rule)

    def draw(self, rng: random.Random, construction: str | None = None) -> Derivation:
        """Draws one sentence pair; a word occurs twice only if the construction repeats it.

        Args:
            rng: Random number generator.
            construction: Name of the construction; random if None.
        """
        name = construction or rng.choice(list(self.constructions))
        while True:
            draft = _Draft()
            pair = self._apply(rng.choice(self.constructions[name]), rng, draft)
            if len(set(draft.words)) == len(draft.words):
                return Derivation(name, pair, tuple(draft.content))

    def derivations(self, seed: int) -> Iterator[Derivation]:
        """Yields derivations with distinct sources until `_MAX_REPEATS` draws in a row repeat."""
        rng = random.Random(seed)
        seen: set[str] = set()
        n_repeats = 0
        while n_repeats < _MAX_REPEATS:
            derivation = self.draw(rng)
            n_repeats += 1
            if derivation.pair.source not in seen:
                seen.add(derivation.pair.source)
                n_repeats = 0
                yield derivation

    def splits(
        self, *, n_train: int, n_val: int, n_test: int, seed: int, held_out: float = 0.1
    ) -> Splits:
        """Draws three splits of the given sizes; equal arguments give equal splits.

        Raises:
            ValueError: `held_out` is not between 0 and 1, or the grammar has fewer sentences than
                requested.
        """
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"held_out={held_out} must be between 0 and 1, for instance 0.1")
        sizes = {"train": n_train, "val": n_val, "test": n_test}
        splits: dict[str, list[Pair]] = {name: [] for name in sizes}
        # A split of share p needs about n / p draws; after eight times as many it is exhausted.
        shares = {"train": 1.0 - held_out, "val": held_out / 2, "test": held_out / 2}
        budget = 8 * int(max(sizes[name] / shares[name] for name in sizes)) + 1000
        for derivation in islice(self.derivations(seed), budget):
            split = derivation.split(held_out)
            if len(splits[split]) < sizes[split]:
                splits[split].append(derivation.pair)
            elif all(len(splits[name]) >= size for name, size in sizes.items()):
                break
        short = {name: len(pairs) for name, pairs in splits.items() if len(pairs) < sizes[name]}
        if short:
            raise ValueError(f"requested {sizes}, found only {short}; ask for fewer sentences")
        return Splits(**splits)

    def _apply(self, rule: Rule, rng: random.Random, draft: _Draft) -> Pair:
        children = {
            name: self._expand(name.partition(".")[0], rng, draft)
            for name in dict.fromkeys(_CHILD.findall(rule.classical))
        }
        source = _CHILD.sub(lambda match: children[match[1]].source, rule.classical)
        target = _CHILD.sub(lambda match: children[match[1]].target, rule.modern)
        return Pair(source, target)

    def _expand(self, name: str, rng: random.Random, draft: _Draft) -> Pair:
        if name in self._phrases:
            return self._apply(rng.choice(self._phrases[name]), rng, draft)
        word = rng.choice(self._lexicon[name])
        draft.words.append(word.classical)
        if name not in _ADJUNCTS:
            draft.content.append(word.classical)
        return Pair(*word)

    def _check(self, name: str, rule: Rule) -> None:
        children = set(_CHILD.findall(rule.classical))
        if children != set(_CHILD.findall(rule.modern)):
            raise ValueError(
                f"the two sides of {name}: {rule} name different children; use the same on both"
            )
        unknown = {child.partition(".")[0] for child in children} - {*self._phrases, *self._lexicon}
        if unknown:
            raise ValueError(f"{name}: {rule} names unknown classes {sorted(unknown)}; define them")
