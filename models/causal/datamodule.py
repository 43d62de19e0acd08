"""The sentences of the causal classifier for a Trainer."""

from collections.abc import Sequence
from itertools import islice

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from models.causal.backbone import BackboneConfig, load_tokenizer, vocabulary_size
from models.causal.batches import Batch, EncodedSentences, Encoder, collate
from models.causal.sentences import Language, Sentence, SentenceSource, Unusual


class CausalDataModule(pl.LightningDataModule):
    """Sentences that break off before a word or a number, as padded batches.

    Training, validation and test sentences are drawn apart; facts occur in all three, as they
    have to be known, while names and numbers are put together anew.

    Raises:
        ValueError: an option is unknown or out of its range.
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
        """Choose the sentences.

        Args:
            backbone: The trunk whose tokenizer cuts the text; the model's own.
            batch_size: Sentences in a batch.
            n_train: Training sentences.
            n_val: Validation sentences.
            n_test: Test sentences.
            languages: `en`, `zh`, or both.
            numbers: Share of the sentences after which a number comes.
            unusual: Kinds of unusual numbers: `zero`, `negative`, `extreme`, `missing`.
            unusual_share: Of the numbers, where there are kinds.
            seed: Decides the sentences and the order of every epoch.
            num_workers: Processes that collate; the data are in memory, so 0 is fast.
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
        """By part; empty before `setup`."""

    def setup(self, stage: str | None = None) -> None:
        """Draw and encode; the second call does nothing."""
        if self._encoded:
            return
        tokenizer = load_tokenizer(self.backbone)

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        encoder = Encoder(encode, num_id=vocabulary_size(self.backbone))
        for part, size in self._sizes.items():
            self.sentences[part] = list(islice(self.source.draw(f"{self.seed} {part}"), size))
            self._encoded[part] = EncodedSentences(self.sentences[part], encoder)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training sentences, in another order every epoch."""
        order = torch.Generator().manual_seed(self.seed)
        return self._loader("train", shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation sentences in their own order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test sentences in their own order."""
        return self._loader("test")

    def _loader(
        self, part: str, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[Batch]:
        return DataLoader(
            self._encoded[part],
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=generator,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
