"""Reads a parallel corpus stored as ``双语数据/<book>/.../source.txt`` and ``target.txt``.

The two UTF-8 files of a chapter are aligned line by line: Classical Chinese in ``source.txt``,
modern Chinese in ``target.txt``. A hash of its path assigns each whole chapter to training,
validation or test, because neighbouring sentences share names and phrases. Unusable pairs are
counted in the report; malformed files raise an error that names file and line.
"""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, get_args

from models.translation.pairs import Pair, Splits

LongPairs = Literal["drop", "truncate"]
FOLDER = "双语数据"


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """Counts of chapters and of kept, dropped and truncated pairs."""

    n_chapters: int
    """Folders with a source and a target file."""
    n_pairs: int
    """Pairs kept."""
    n_empty: int
    """Pairs dropped because one side was empty."""
    n_long: int
    """Pairs dropped or truncated because one side exceeded the limit."""


def find_chapters(root: str | Path) -> list[Path]:
    """Returns the chapter folders below ``root/双语数据``, sorted by path.

    Raises:
        ValueError: There is no chapter, or a chapter lacks its source or target file.
    """
    base = Path(root) / FOLDER
    if not base.is_dir():
        raise ValueError(f"{base} is not a folder; pass as root the folder that contains {FOLDER}")
    files = [path for path in base.rglob("*.txt") if path.name in ("source.txt", "target.txt")]
    for path in files:
        other = path.with_name("target.txt" if path.name == "source.txt" else "source.txt")
        if not other.is_file():
            raise ValueError(f"{path} has no {other.name} next to it; add {other} or remove {path}")
    chapters = sorted({path.parent for path in files})
    if not chapters:
        raise ValueError(f"{base} contains no source.txt; expected {FOLDER}/<book>/.../source.txt")
    return chapters


def read_chapter(chapter: Path) -> list[Pair]:
    """Returns the aligned lines of one chapter, empty lines included.

    Raises:
        ValueError: The two files differ in their number of lines, or a line is not UTF-8.
    """
    source, target = (_read_lines(chapter / name) for name in ("source.txt", "target.txt"))
    if len(source) != len(target):
        line = min(len(source), len(target)) + 1
        raise ValueError(
            f"{chapter / 'source.txt'} has {len(source)} lines and target.txt has {len(target)}: "
            f"line {line} has no counterpart; align the two files line by line"
        )
    return [Pair(*sides) for sides in zip(source, target, strict=True)]


def _read_lines(path: Path) -> list[str]:
    raw_lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not raw_lines[-1]:
        raw_lines.pop()
    return [_decode(raw, f"{path}, line {number}") for number, raw in enumerate(raw_lines, 1)]


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}, byte {error.start + 1}: {error.reason}; save the file as UTF-8"
        ) from error


class ClassicalModernCorpus:
    """A parallel corpus, read once and split by chapter.

    Raises:
        ValueError: An option is out of range, or a file is malformed (see the functions above).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        max_characters: int = 63,
        long_pairs: LongPairs = "drop",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
    ) -> None:
        """Reads all chapters.

        Args:
            root: The folder that contains 双语数据.
            max_characters: Longest allowed side of a pair, in characters.
            long_pairs: Whether to `drop` or `truncate` longer pairs.
            val_fraction: Expected share of the chapters in the validation split.
            test_fraction: Expected share of the chapters in the test split.
        """
        if max_characters < 1:
            raise ValueError(f"max_characters={max_characters} must be at least 1")
        if long_pairs not in get_args(LongPairs):
            raise ValueError(
                f"long_pairs={long_pairs!r} is unknown; choose one of {get_args(LongPairs)}"
            )
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} must be 0 or more "
                f"with a sum below 1, for instance 0.05 each"
            )
        self.root = Path(root)
        self._max_characters = max_characters
        self._drop_long = long_pairs == "drop"
        self._fractions = (test_fraction, val_fraction)
        self._n_empty = self._n_long = 0
        self.chapters = {
            path.relative_to(self.root).as_posix(): self._usable(read_chapter(path))
            for path in find_chapters(self.root)
        }
        """Usable pairs of each chapter, by the chapter's path relative to the root."""

    @property
    def report(self) -> CorpusReport:
        """Counts of kept, dropped and truncated pairs."""
        return CorpusReport(
            n_chapters=len(self.chapters),
            n_pairs=sum(map(len, self.chapters.values())),
            n_empty=self._n_empty,
            n_long=self._n_long,
        )

    def split_of(self, chapter: str) -> Literal["train", "val", "test"]:
        """Returns the split of a chapter, which depends only on its path."""
        digest = blake2b(chapter.encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        test_fraction, val_fraction = self._fractions
        if share < test_fraction:
            return "test"
        return "val" if share < test_fraction + val_fraction else "train"

    def splits(self) -> Splits:
        """Returns the pairs of each split, in the order of the chapter paths."""
        splits = Splits([], [], [])
        for chapter, pairs in self.chapters.items():
            getattr(splits, self.split_of(chapter)).extend(pairs)
        return splits

    def _usable(self, pairs: list[Pair]) -> list[Pair]:
        usable = []
        for pair in pairs:
            if not pair.source or not pair.target:
                self._n_empty += 1
                continue
            if max(map(len, pair)) > self._max_characters:
                self._n_long += 1
                if self._drop_long:
                    continue
            usable.append(Pair(*(side[: self._max_characters] for side in pair)))
        return usable
