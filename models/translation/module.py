"""LightningModule that trains, validates and tests the translation Transformer."""

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
    """Trains with teacher forcing; validates and tests with teacher forcing and decoding.

    The network is built once the vocabulary is known: from the datamodule of the Trainer, by
    `build`, or from the checkpoint in `load_from_checkpoint`.

    Logged keys: `train/loss` (nats per token, label smoothing included, every step); `val/loss`,
    `val/loss_first_token`, `val/loss_rest` (nats per token without label smoothing, every epoch);
    `val/exact_match`, `val/bleu`, `val/chrf` (0 to 1, of decoded sentences, every epoch; absent
    during the sanity check and if none are decoded); the same under `test/`.

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
        """Stores the hyperparameters; the network is built later.

        Args:
            network: Configuration of the Transformer; None for the default.
            lr: Peak learning rate of AdamW.
            betas: Betas of AdamW.
            weight_decay: Weight decay of matrices and embeddings; gains and biases have none.
            schedule: Learning-rate schedule, stepped every optimizer step.
            warmup_steps: Steps to the peak learning rate; ignored with `none`.
            label_smoothing: Probability mass spread evenly over the vocabulary.
            beam_size: Beam size of decoding; 1 decodes greedily.
            length_penalty: Exponent of the length penalty, used if `beam_size` exceeds 1.
            n_decoded_val: Maximum number of sentences decoded in a validation, on each rank.
            n_decoded_test: The same for a test.
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
        """Builds the network for a vocabulary; does nothing if it is built already.

        Raises:
            ValueError: The vocabulary differs from that of the network or from the configured size.
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
                f"vocabulary_size={configured} but the vocabulary has {len(vocabulary)} ids; omit "
                f"vocabulary_size to take it from the data"
            )
        self.vocabulary = vocabulary
        self.network_config = replace(self.network_config, vocabulary_size=len(vocabulary))
        self.network = Transformer(self.network_config)

    def configure_model(self) -> None:
        """Builds the network from the datamodule's vocabulary, unless it is built already.

        Builds nothing without a Trainer: `load_from_checkpoint` calls this hook before
        `on_load_checkpoint`, which has the vocabulary.
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
        """Returns the logits (B, T, V) of the token after each target position."""
        logits_BTV: Tensor = self._require_network()(source_BS, target_BT)
        return logits_BTV

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the mean loss per token, with label smoothing."""
        loss = self._loss(batch, self.hparams["label_smoothing"]).total
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.source_BS))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss and decodes until `n_decoded_val` sentences are decoded."""
        self._evaluate(batch, "val", self.hparams["n_decoded_val"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss and decodes until `n_decoded_test` sentences are decoded."""
        self._evaluate(batch, "test", self.hparams["n_decoded_test"])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """Returns the translations of a batch as text."""
        return self.translate(batch.source_BS)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the decoded validation sentences."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the decoded test sentences."""
        self._log_scores("test")

    @torch.no_grad()
    def translate(self, source_BS: Tensor) -> list[str]:
        """Translates padded source ids into text, greedily or with the configured beam.

        Outside a Trainer call `eval()` first, or dropout changes the translation.
        """
        network, vocabulary = self._require_network(), self.vocabulary
        assert vocabulary is not None
        beam_size, length_penalty = self.hparams["beam_size"], self.hparams["length_penalty"]
        if beam_size == 1:
            decoded = greedy_decode(network, source_BS)
        else:
            decoded = beam_decode(
                network, source_BS, beam_size=beam_size, length_penalty=length_penalty
            )
        return [vocabulary.decode(ids) for ids in decoded.tokens_BT.tolist()]

    def preflight_probes(self, batch: Batch) -> list[MaskProbe | PositionProbe]:
        """Returns the mask and position probes that `lit_stability.Preflight` runs."""
        return translation_probes(batch, self.network_config.pad_id, lambda m: m._require_network())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns AdamW and its learning-rate scheduler."""
        hp = self.hparams
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": hp["weight_decay"]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=hp["lr"], betas=hp["betas"])
        total_steps = float("inf")
        if hp["schedule"] in ("warmup_cosine", "onecycle"):
            total_steps = self.trainer.estimated_stepping_batches
        scheduler = make_scheduler(
            hp["schedule"], optimizer, warmup_steps=hp["warmup_steps"], total_steps=total_steps
        )
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the network configuration and the vocabulary to the checkpoint."""
        if self.vocabulary is not None:
            checkpoint["network_config"] = asdict(self.network_config)
            checkpoint["vocabulary"] = list(self.vocabulary.characters)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the saved network, or checks that the existing one has the saved vocabulary."""
        if "vocabulary" in checkpoint:
            if self.network is None:
                self.network_config = TransformerConfig(**checkpoint["network_config"])
            self.build(Vocabulary(checkpoint["vocabulary"]))

    def _require_network(self) -> Transformer:
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
        n_rest = max(1, n_tokens - n_sentences)
        self.log(f"{stage}/loss_rest", loss.rest, batch_size=n_rest, sync_dist=True)
        n_remaining = 0 if self.trainer.sanity_checking else limit - self._n_decoded
        if n_remaining > 0:
            self._score_translations(Batch(*(ids[:n_remaining] for ids in batch)), stage)

    def _score_translations(self, batch: Batch, stage: Stage) -> None:
        """Decodes and updates the metrics; an unknown character of a reference never matches."""
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
