"""LightningDataModule of the translation model: the synthetic grammar or a corpus on disk."""

import random
from typing import Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from models.translation.batches import Batch, EncodedPairs, LengthSortedSampler, collate
from models.translation.corpus import ClassicalModernCorpus, CorpusReport, LongPairs
from models.translation.grammar import Grammar
from models.translation.pairs import Pair, Splits
from models.translation.vocabulary import Vocabulary

Source = Literal["grammar", "classical_modern"]
Split = Literal["train", "val", "test"]


class TranslationDataModule(pl.LightningDataModule):
    """Provides padded batches of sentence pairs, and the vocabulary of the training pairs.

    Raises:
        ValueError: An option is unknown or out of range, a corpus has no `root`, or the grammar
            has one.
    """

    def __init__(
        self,
        *,
        source: Source = "grammar",
        root: str | None = None,
        batch_size: int = 128,
        n_train: int = 20_000,
        n_val: int = 500,
        n_test: int = 500,
        max_length: int = 32,
        seed: int = 0,
        held_out: float = 0.1,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        long_pairs: LongPairs = "drop",
        min_count: int = 1,
        test_on: Split = "test",
        num_workers: int = 0,
    ) -> None:
        """Stores the options; `setup` creates or reads the pairs.

        Args:
            source: `grammar` generates sentences, `classical_modern` reads a corpus below `root`.
            root: The folder that contains 双语数据; for `classical_modern` only.
            batch_size: Pairs per batch.
            n_train: Training pairs; from a corpus, at most this many, sampled with `seed`.
            n_val: Validation pairs, likewise.
            n_test: Test pairs, likewise.
            max_length: Longest side in tokens, eos included; at most the network's `max_length`.
            seed: Determines the generated sentences and the order of every epoch.
            held_out: Share of the grammar's combinations excluded from training.
            val_fraction: Share of the corpus's chapters in the validation split.
            test_fraction: Share of the corpus's chapters in the test split.
            long_pairs: Whether to `drop` or `truncate` corpus pairs longer than `max_length`.
            min_count: Characters that occur less often in the training pairs become unknown.
            test_on: Split used for testing; `train` tests whether the model has memorised it.
            num_workers: Worker processes of each DataLoader; 0 is fast, as the data are in memory.
        """
        super().__init__()
        if source not in get_args(Source):
            raise ValueError(f"source={source!r} is unknown; choose one of {get_args(Source)}")
        if test_on not in get_args(Split):
            raise ValueError(f"test_on={test_on!r} is unknown; choose one of {get_args(Split)}")
        if (source == "classical_modern") != (root is not None):
            raise ValueError(
                f"source={source!r} with root={root!r}: 'classical_modern' needs the root that "
                f"contains 双语数据, 'grammar' reads no files and takes no root"
            )
        sizes = {"batch_size": batch_size, "n_train": n_train, "n_val": n_val, "n_test": n_test}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2: one character and eos")
        self.source, self.root = source, root
        self.batch_size, self.num_workers = batch_size, num_workers
        self.max_length, self.seed, self.min_count = max_length, seed, min_count
        self._sizes = (n_train, n_val, n_test)
        self._test_on: Split = test_on
        self._held_out, self._long_pairs = held_out, long_pairs
        self._fractions = (val_fraction, test_fraction)
        self._splits: Splits | None = None
        self._vocabulary: Vocabulary | None = None
        self._encoded: dict[str, EncodedPairs] = {}
        self.report: CorpusReport | None = None
        """Counts of dropped and truncated corpus pairs; None for the grammar and before `setup`."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the training pairs.

        Raises:
            RuntimeError: `setup` has not run.
        """
        if self._vocabulary is None:
            raise RuntimeError("the vocabulary is built by setup(); call datamodule.setup() first")
        return self._vocabulary

    @property
    def splits(self) -> Splits:
        """Sentence pairs as text.

        Raises:
            RuntimeError: `setup` has not run.
        """
        if self._splits is None:
            raise RuntimeError("the pairs are created by setup(); call datamodule.setup() first")
        return self._splits

    def setup(self, stage: str | None = None) -> None:
        """Creates or reads the pairs, builds the vocabulary and encodes; does this only once."""
        if self._splits is not None:
            return
        self._splits = (
            self._generate() if self.source == "grammar" else self._read_corpus(self.root or "")
        )
        self._vocabulary = Vocabulary.from_pairs(self._splits.train, min_count=self.min_count)
        self._encoded = {
            name: EncodedPairs(pairs, self._vocabulary)
            for name, pairs in self._splits._asdict().items()
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns batches of pairs of similar length, in an order fixed by seed and epoch."""
        lengths = self._encoded["train"].lengths()
        return self._loader("train", LengthSortedSampler(lengths, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation pairs, unshuffled."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns the pairs of the split `test_on`, unshuffled."""
        return self._loader(self._test_on)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Returns the test pairs, unshuffled."""
        return self._loader("test")

    def _generate(self) -> Splits:
        n_train, n_val, n_test = self._sizes
        return Grammar().splits(
            n_train=n_train, n_val=n_val, n_test=n_test, seed=self.seed, held_out=self._held_out
        )

    def _read_corpus(self, root: str) -> Splits:
        corpus = ClassicalModernCorpus(
            root,
            max_characters=self.max_length - 1,
            long_pairs=self._long_pairs,
            val_fraction=self._fractions[0],
            test_fraction=self._fractions[1],
        )
        self.report = corpus.report
        rank_zero_info(f"{root}: {self.report}")
        rng = random.Random(self.seed)
        return Splits(
            *(
                _at_most(size, pairs, rng)
                for size, pairs in zip(self._sizes, corpus.splits(), strict=True)
            )
        )

    def _loader(self, split: str, sampler: LengthSortedSampler | None = None) -> DataLoader[Batch]:
        return DataLoader(
            self._encoded[split],
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def _at_most(size: int, pairs: list[Pair], rng: random.Random) -> list[Pair]:
    return pairs if len(pairs) <= size else rng.sample(pairs, size)
