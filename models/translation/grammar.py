"""A synchronous grammar of literary Chinese: it writes a sentence and its translation together.

The grammar is small enough to be learnt in minutes and too large to be learnt by heart. Whether a
sentence is held out is decided by its *combination*, the construction with the content words put
into it: no combination of the held-out part is ever trained on, though every construction and
every word is. Time phrases are adjuncts and do not count, so that two sentences that differ in
nothing else fall on the same side.
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

Part = Literal["train", "val", "test"]
_CHILD = re.compile(r"\{([a-z_]+(?:\.\d)?)\}")
_ADJUNCTS = frozenset({"time"})
_PATIENCE = 1000


@dataclass(frozen=True)
class Derivation:
    """One sentence pair with the choices that made it."""

    construction: str
    pair: Pair
    content: tuple[str, ...]
    """The content words in classical writing, adjuncts left out, in the order drawn."""

    @property
    def combination(self) -> tuple[str, ...]:
        """The construction with its content words: what is held out or not."""
        return (self.construction, *self.content)

    def part(self, held_out: float) -> Part:
        """Tell which part of the corpus this combination belongs to.

        Args:
            held_out: Share of the combinations kept from training; one half of it is `val`.
        """
        digest = blake2b("|".join(self.combination).encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        if share >= held_out:
            return "train"
        return "val" if share < held_out / 2 else "test"


@dataclass
class _Draft:
    """The words chosen so far for one sentence."""

    content: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


class Grammar:
    """Draws sentence pairs from constructions, phrases and a lexicon.

    Raises:
        ValueError: A rule names an unknown class, or its sides name different children.
    """

    def __init__(
        self,
        constructions: Mapping[str, tuple[Rule, ...]] = CONSTRUCTIONS,
        phrases: Mapping[str, tuple[Rule, ...]] = PHRASES,
        lexicon: Mapping[str, tuple[Word, ...]] = LEXICON,
    ) -> None:
        """Take the tables, and check that they fit together."""
        self.constructions = dict(constructions)
        self._phrases = dict(phrases)
        self._lexicon = dict(lexicon)
        for name, rules in {**self.constructions, **self._phrases}.items():
            for rule in rules:
                self._check(name, rule)

    def draw(self, rng: random.Random, construction: str | None = None) -> Derivation:
        """Draw one sentence; no word occurs twice in it unless the construction repeats it.

        Args:
            rng: The only source of chance.
            construction: Which construction to use; drawn as well when None.
        """
        name = construction or rng.choice(list(self.constructions))
        while True:
            draft = _Draft()
            pair = self._apply(rng.choice(self.constructions[name]), rng, draft)
            if len(set(draft.words)) == len(draft.words):
                return Derivation(name, pair, tuple(draft.content))

    def derivations(self, seed: int) -> Iterator[Derivation]:
        """Draw, never the same source twice, until a thousand draws in a row bring none."""
        rng = random.Random(seed)
        seen: set[str] = set()
        stale = 0
        while stale < _PATIENCE:
            derivation = self.draw(rng)
            stale += 1
            if derivation.pair.source not in seen:
                seen.add(derivation.pair.source)
                stale = 0
                yield derivation

    def splits(
        self, *, n_train: int, n_val: int, n_test: int, seed: int, held_out: float = 0.1
    ) -> Splits:
        """Draw three parts of the given sizes; the same arguments give the same parts.

        Raises:
            ValueError: `held_out` leaves a part nothing to draw from, or the sizes exceed what
                the grammar can say.
        """
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"held_out={held_out} must be between 0 and 1, for instance 0.1")
        wanted = {"train": n_train, "val": n_val, "test": n_test}
        parts: dict[str, list[Pair]] = {name: [] for name in wanted}
        # A part of share p needs about n / p draws; eight times as many is exhaustion.
        shares = {"train": 1.0 - held_out, "val": held_out / 2, "test": held_out / 2}
        budget = 8 * int(max(wanted[name] / shares[name] for name in wanted)) + 1000
        for derivation in islice(self.derivations(seed), budget):
            part = derivation.part(held_out)
            if len(parts[part]) < wanted[part]:
                parts[part].append(derivation.pair)
            elif all(len(parts[name]) >= size for name, size in wanted.items()):
                break
        short = {name: len(pairs) for name, pairs in parts.items() if len(pairs) < wanted[name]}
        if short:
            raise ValueError(f"asked for {wanted}, found only {short}; ask for fewer sentences")
        return Splits(**parts)

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
            raise ValueError(f"the two sides of {name}: {rule} name different children; match them")
        unknown = {child.partition(".")[0] for child in children} - {*self._phrases, *self._lexicon}
        if unknown:
            raise ValueError(f"{name}: {rule} names unknown classes {sorted(unknown)}; define them")
