"""LightningDataModule of the causal classifier: generated sentences in padded batches."""

from collections.abc import Sequence
from itertools import islice

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from models.causal.backbone import BackboneConfig, load_tokenizer, vocabulary_size
from models.causal.batches import Batch, EncodedSentences, Encoder, collate
from models.causal.sentences import Language, Sentence, SentenceSource, Unusual


class CausalDataModule(pl.LightningDataModule):
    """Provides padded batches of sentence prefixes that continue with a word or a number.

    Training, validation and test sentences are drawn with different seeds. The same facts occur
    in all three splits, because the model must know them; names and numbers vary.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig | None = None,
        batch_size: int = 32,
        n_train: int = 2000,
        n_val: int = 500,
        n_test: int = 500,
        languages: Sequence[Language] = ("en", "zh"),
        numbers: float = 0.5,
        unusual: Sequence[Unusual] = (),
        unusual_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Stores the options; `setup` generates the sentences.

        Args:
            backbone: Backbone whose tokenizer encodes the text; must be the model's backbone.
            batch_size: Sentences per batch.
            n_train: Number of training sentences.
            n_val: Number of validation sentences.
            n_test: Number of test sentences.
            languages: `en`, `zh`, or both.
            numbers: Share of the sentences that continue with a number.
            unusual: Kinds of unusual numbers: `zero`, `negative`, `extreme`, `missing`.
            unusual_share: Share of the numbers that are unusual, if `unusual` is not empty.
            seed: Determines the sentences and the order of every epoch.
            num_workers: Worker processes of each DataLoader; 0 is fast, as the data are in memory.
        """
        super().__init__()
        sizes = {"batch_size": batch_size, "n_train": n_train, "n_val": n_val, "n_test": n_test}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.backbone = backbone or BackboneConfig()
        self.source = SentenceSource(
            languages=languages, numbers=numbers, unusual=unusual, share=unusual_share
        )
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._sizes = {"train": n_train, "val": n_val, "test": n_test}
        self._encoded: dict[str, EncodedSentences] = {}
        self.sentences: dict[str, list[Sentence]] = {}
        """Sentences by split; empty before `setup`."""

    def setup(self, stage: str | None = None) -> None:
        """Generates and encodes the sentences, once."""
        if self._encoded:
            return
        tokenizer = load_tokenizer(self.backbone)

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        encoder = Encoder(encode, num_id=vocabulary_size(self.backbone))
        for split, size in self._sizes.items():
            self.sentences[split] = list(islice(self.source.draw(f"{self.seed} {split}"), size))
            self._encoded[split] = EncodedSentences(self.sentences[split], encoder)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the training sentences, in a new order every epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader("train", shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation sentences, unshuffled."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns the test sentences, unshuffled."""
        return self._loader("test")

    def _loader(
        self, split: str, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[Batch]:
        return DataLoader(
            self._encoded[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=generator,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
