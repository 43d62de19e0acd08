"""The LightningModule that trains the translation Transformer, validates it and lets it write."""

from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MetricCollection

from lit_stability.checks.preflight import MaskProbe, PositionProbe
from models.translation.batches import Batch
from models.translation.config import TransformerConfig
from models.translation.decoding import beam_decode, greedy_decode
from models.translation.metrics import TokenLoss, token_loss, translation_metrics
from models.translation.probes import translation_probes
from models.translation.schedules import Schedule, make_scheduler
from models.translation.transformer import Transformer
from models.translation.vocabulary import Vocabulary

Stage = Literal["val", "test"]


class TranslationModule(pl.LightningModule):
    """Teacher forcing in training; teacher forcing and decoding in validation and test.

    The network is built when the vocabulary is known: from the datamodule in a Trainer, by
    `build` otherwise, from the checkpoint in `load_from_checkpoint`.

    Logged keys: `train/loss` (nats per token, with label smoothing if any, every step);
    `val/loss`, `val/loss_first_token`, `val/loss_rest` (nats per token without smoothing, per
    epoch); `val/exact_match`, `val/bleu`, `val/chrf` (0 to 1, of decoded sentences, per epoch;
    absent during the sanity check and when none are decoded); the same under `test/`.

    Raises:
        ValueError: An option is unknown or out of range, or there is no vocabulary.
    """

    def __init__(
        self,
        *,
        network: TransformerConfig | None = None,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        schedule: Schedule = "warmup_cosine",
        warmup_steps: int = 100,
        label_smoothing: float = 0.0,
        beam_size: int = 1,
        length_penalty: float = 0.6,
        n_decoded_val: int = 64,
        n_decoded_test: int = 500,
    ) -> None:
        """Choose the network and how it is trained.

        Args:
            network: Shape of the Transformer; None for the default shape.
            lr: Peak learning rate of AdamW.
            betas: AdamW's decay rates.
            weight_decay: On matrices and embeddings; gains and biases have none.
            schedule: Factor on `lr` by optimizer step.
            warmup_steps: Steps to the peak; without meaning under `none`.
            label_smoothing: Share of the target distribution spread over the vocabulary.
            beam_size: Width of the beam; 1 decodes greedily.
            length_penalty: Exponent of the length penalty, for a beam of more than 1.
            n_decoded_val: Most sentences to decode in one validation, on each rank.
            n_decoded_test: The same in a test.
        """
        super().__init__()
        if schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule={schedule!r} is unknown; choose one of {get_args(Schedule)}"
            )
        if lr <= 0:
            raise ValueError(f"lr={lr} must be greater than 0")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
        if beam_size < 1 or warmup_steps < 0:
            raise ValueError(
                f"beam_size={beam_size} must be >= 1, warmup_steps={warmup_steps} >= 0"
            )
        self.save_hyperparameters(ignore=["network"])
        self.network_config = network or TransformerConfig()
        self.network: Transformer | None = None
        self.vocabulary: Vocabulary | None = None
        self.scores = torch.nn.ModuleDict(
            {s: translation_metrics(f"{s}/") for s in get_args(Stage)}
        )
        self._n_decoded = 0

    def build(self, vocabulary: Vocabulary) -> None:
        """Build the network for a vocabulary; a second call changes nothing.

        Raises:
            ValueError: The vocabulary is not the one that the network has or was configured for.
        """
        if self.network is not None:
            if vocabulary != self.vocabulary:
                raise ValueError(
                    f"the network was built for another vocabulary of {len(self.vocabulary or ())} "
                    f"ids, got {len(vocabulary)}; use the data it was trained on"
                )
            return
        configured = self.network_config.vocabulary_size
        if configured not in (None, len(vocabulary)):
            raise ValueError(
                f"vocabulary_size={configured} but the vocabulary has {len(vocabulary)} ids; leave "
                f"vocabulary_size out to take it from the data"
            )
        self.vocabulary = vocabulary
        self.network_config = replace(self.network_config, vocabulary_size=len(vocabulary))
        self.network = Transformer(self.network_config)

    def configure_model(self) -> None:
        """Build the network from the datamodule's vocabulary, unless it is there already.

        Without a Trainer nothing is built: `load_from_checkpoint` calls this before
        `on_load_checkpoint`, which knows the vocabulary.
        """
        try:
            trainer = self.trainer
        except RuntimeError:
            return
        vocabulary = getattr(getattr(trainer, "datamodule", None), "vocabulary", None)
        if vocabulary is not None:
            self.build(vocabulary)
        elif self.network is None:
            raise ValueError(
                "there is no vocabulary to build the network for; fit with a "
                "TranslationDataModule, or call module.build(vocabulary) first"
            )

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """Give the logits (B, T, V) of the token after each target position."""
        logits_BTV: Tensor = self._built()(source_BS, target_BT)
        return logits_BTV

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss per token, smoothed if asked for."""
        loss = self._loss(batch, self.hparams["label_smoothing"]).total
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.source_BS))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss, and decode until `n_decoded_val` sentences are done."""
        self._evaluate(batch, "val", self.hparams["n_decoded_val"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss, and decode until `n_decoded_test` sentences are done."""
        self._evaluate(batch, "test", self.hparams["n_decoded_test"])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """Translate a batch into text."""
        return self.translate(batch.source_BS)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the decoded sentences."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the decoded sentences."""
        self._log_scores("test")

    @torch.no_grad()
    def translate(self, source_BS: Tensor) -> list[str]:
        """Decode padded source ids into text, greedily or with the configured beam.

        Call `eval()` first outside a Trainer, or dropout will have its say.
        """
        network, vocabulary = self._built(), self.vocabulary
        assert vocabulary is not None
        beam_size, penalty = self.hparams["beam_size"], self.hparams["length_penalty"]
        if beam_size == 1:
            decoded = greedy_decode(network, source_BS)
        else:
            decoded = beam_decode(network, source_BS, beam_size=beam_size, length_penalty=penalty)
        return [vocabulary.decode(ids) for ids in decoded.tokens_BT.tolist()]

    def preflight_probes(self, batch: Batch) -> list[MaskProbe | PositionProbe]:
        """Say what may and must be seen, for `lit_stability.Preflight`."""
        return translation_probes(batch, self.network_config.pad_id, lambda m: m._built())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW, and the schedule stepped with it."""
        hp = self.hparams
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": hp["weight_decay"]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=hp["lr"], betas=hp["betas"])
        total = float("inf")
        if hp["schedule"] in ("warmup_cosine", "onecycle"):
            total = self.trainer.estimated_stepping_batches
        scheduler = make_scheduler(
            hp["schedule"], optimizer, warmup_steps=hp["warmup_steps"], total_steps=total
        )
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's shape and the vocabulary, as plain values."""
        if self.vocabulary is not None:
            checkpoint["network_config"] = asdict(self.network_config)
            checkpoint["vocabulary"] = list(self.vocabulary.characters)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that was saved, or check that it is the one at hand."""
        if "vocabulary" in checkpoint:
            if self.network is None:
                self.network_config = TransformerConfig(**checkpoint["network_config"])
            self.build(Vocabulary(checkpoint["vocabulary"]))

    def _built(self) -> Transformer:
        if self.network is None:
            raise ValueError("the network is not built yet; call module.build(vocabulary) first")
        return self.network

    def _loss(self, batch: Batch, label_smoothing: float = 0.0) -> TokenLoss:
        logits_BTV = self(batch.source_BS, batch.target_BT[:, :-1])
        return token_loss(
            logits_BTV,
            batch.target_BT[:, 1:],
            pad_id=self.network_config.pad_id,
            label_smoothing=label_smoothing,
        )

    def _evaluate(self, batch: Batch, stage: Stage, limit: int) -> None:
        loss, n_sentences = self._loss(batch), len(batch.target_BT)
        n_tokens = int((batch.target_BT[:, 1:] != self.network_config.pad_id).sum())
        self.log(f"{stage}/loss", loss.total, batch_size=n_tokens, sync_dist=True)
        self.log(f"{stage}/loss_first_token", loss.first, batch_size=n_sentences, sync_dist=True)
        rest = max(1, n_tokens - n_sentences)
        self.log(f"{stage}/loss_rest", loss.rest, batch_size=rest, sync_dist=True)
        wanted = 0 if self.trainer.sanity_checking else limit - self._n_decoded
        if wanted > 0:
            self._score(Batch(*(ids[:wanted] for ids in batch)), stage)

    def _score(self, batch: Batch, stage: Stage) -> None:
        """Compare with references whose unknown characters no hypothesis can match."""
        assert self.vocabulary is not None
        references = [
            [self.vocabulary.decode(ids, unknown="□")] for ids in batch.target_BT.tolist()
        ]
        self._n_decoded += len(references)
        self._metrics(stage).update(self.translate(batch.source_BS), references)

    def _metrics(self, stage: Stage) -> MetricCollection:
        metrics = self.scores[stage]
        assert isinstance(metrics, MetricCollection)
        return metrics

    def _log_scores(self, stage: Stage) -> None:
        if self._n_decoded:
            self.log_dict(self._metrics(stage).compute())
            self._metrics(stage).reset()
        self._n_decoded = 0
