"""Character-level vocabulary shared by source and target.

Four special tokens have fixed ids: pad 0, bos 1, eos 2, unk 3. The vocabulary is built from the
training pairs only; characters that occur only in other splits are unknown.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from models.translation.pairs import Pair

PAD, BOS, EOS, UNK = range(4)
_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
_FORMAT = "lit_stability/character-vocabulary/1"


class Vocabulary:
    """Maps characters to ids, after the four special tokens.

    >>> vocabulary = Vocabulary("学而时习之")
    >>> vocabulary.encode("习之", bos=True, eos=True)
    [1, 7, 8, 2]
    >>> vocabulary.decode([1, 7, 8, 2, 0, 0])
    '习之'

    Raises:
        ValueError: An entry is not a single character, or is repeated.
    """

    def __init__(self, characters: Sequence[str]) -> None:
        """Assigns ids from 4 on in the given order."""
        self.characters = tuple(characters)
        wrong = [entry for entry in self.characters if len(entry) != 1]
        if wrong:
            raise ValueError(f"a vocabulary entry is one character, got {wrong[:5]!r}; split them")
        self._ids = {char: i for i, char in enumerate(self.characters, len(_SPECIALS))}
        if len(self._ids) != len(self.characters):
            repeated = [char for char, count in Counter(self.characters).items() if count > 1]
            raise ValueError(f"characters occur twice: {repeated[:5]!r}; pass each one once")

    @classmethod
    def from_pairs(cls, pairs: Iterable[Pair], *, min_count: int = 1) -> "Vocabulary":
        """Builds a vocabulary from the characters of both sides, the most frequent first.

        Args:
            pairs: Training pairs.
            min_count: Characters that occur less often become unknown.

        Raises:
            ValueError: No character occurs `min_count` times.
        """
        counts = Counter(char for pair in pairs for side in pair for char in side)
        kept = [char for char, count in counts.items() if count >= min_count]
        if not kept:
            raise ValueError(
                f"no character occurs {min_count} times in the training pairs; pass training "
                f"pairs, or lower min_count={min_count}"
            )
        return cls(sorted(kept, key=lambda char: (-counts[char], char)))

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Loads a file written by `save`.

        Raises:
            ValueError: The file is not such a JSON file; the message names it.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); write it with save()") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            actual = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} has format {actual!r}, not {_FORMAT!r}; write it with save()")
        return cls(content["characters"])

    def save(self, path: str | Path) -> None:
        """Saves the characters as JSON in UTF-8."""
        content = {"format": _FORMAT, "characters": list(self.characters)}
        Path(path).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Returns the number of ids, special tokens included."""
        return len(_SPECIALS) + len(self.characters)

    def __eq__(self, other: object) -> bool:
        """Compares the characters and their order."""
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        """Hashes the characters, consistent with `__eq__`."""
        return hash(self.characters)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Converts text to ids, optionally with bos and eos."""
        ids = [self._ids.get(char, UNK) for char in text]
        return [BOS] * bos + ids + [EOS] * eos

    def decode(self, ids: Iterable[int], *, unknown: str = "\N{REPLACEMENT CHARACTER}") -> str:
        """Converts ids to text up to the first eos, without padding and bos.

        Args:
            ids: Token ids.
            unknown: Text for an unknown character. Pass a different one for references than for
                translations, so that unknown characters never match.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        text: list[str] = []
        for i in ids:
            if i == EOS:
                break
            if not 0 <= i < len(self):
                raise ValueError(f"id {i} is outside the vocabulary of {len(self)} ids")
            if i == UNK:
                text.append(unknown)
            elif i >= len(_SPECIALS):
                text.append(self.characters[i - len(_SPECIALS)])
        return "".join(text)
