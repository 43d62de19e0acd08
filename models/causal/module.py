"""LightningModule that trains, validates and tests the causal classifier."""

from dataclasses import asdict
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from models.causal import cauchy
from models.causal.backbone import BackboneConfig, load_backbone
from models.causal.batches import Batch
from models.causal.heads import HeadsConfig, Prediction
from models.causal.losses import LossForm, gated_regression, one_vs_rest, probabilities
from models.causal.metrics import CausalMetrics
from models.causal.network import CausalClassifier

Stage = Literal["val", "test"]


class CausalModule(pl.LightningModule):
    """Trains the heads and the number embedding on a frozen backbone.

    The network is built by the Trainer, by `build`, or from the checkpoint in
    `load_from_checkpoint`.

    Logged every step: `train/loss`, the sum of the following two, in nats; `train/one_vs_rest`,
    which **starts at K ln 2, that is 1.05e5 with the 151,937 classes of Qwen, and is not an
    explosion** (`models.causal.losses.loss_at_chance`); `train/regression`, the gated loss per
    sentence with a known next number. Logged every epoch under `val/` and `test/`: `loss` and the
    metrics of `models.causal.metrics.CausalMetrics`.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig | None = None,
        heads: HeadsConfig | None = None,
        freeze: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        loss_form: LossForm = "stable",
        gate: float = 1.0,
        regression_weight: float = 1.0,
    ) -> None:
        """Stores the hyperparameters; the network is built later.

        Args:
            backbone: Configuration of the backbone; None for the embedded one.
            heads: Configuration of the heads; None for the defaults.
            freeze: Whether to freeze the backbone.
            lr: Learning rate of AdamW.
            weight_decay: Weight decay of AdamW.
            loss_form: `stable`, or `naive` for the form that saturates, a deliberate fault.
            gate: Hardness of the regression gate, from 0 (soft) to 1 (hard).
            regression_weight: Factor on the regression loss.
        """
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr={lr} must be greater than 0")
        if not 0.0 <= gate <= 1.0:
            raise ValueError(f"gate={gate} must be from 0, soft, to 1, hard")
        if not regression_weight >= 0.0:
            raise ValueError(f"regression_weight={regression_weight} must be 0 or more")
        if loss_form not in get_args(LossForm):
            raise ValueError(
                f"loss_form={loss_form!r} is unknown; choose one of {get_args(LossForm)}"
            )
        self.save_hyperparameters(ignore=["backbone", "heads"])
        self.backbone_config = backbone or BackboneConfig()
        self.heads_config = heads or HeadsConfig()
        self.network: CausalClassifier | None = None
        self.scores = torch.nn.ModuleDict()

    def build(self) -> CausalClassifier:
        """Builds the network if necessary and returns it."""
        if self.network is None:
            network = CausalClassifier(load_backbone(self.backbone_config), self.heads_config)
            if self.hparams["freeze"]:
                network.freeze_backbone()
            threshold = self.heads_config.threshold
            for stage in get_args(Stage):
                self.scores[stage] = CausalMetrics(network.num_id, threshold)
            self.network = network
        return self.network

    def configure_model(self) -> None:
        """Builds the network for a Trainer.

        Builds nothing without a Trainer: `load_from_checkpoint` calls this hook before
        `on_load_checkpoint`, which has the configuration.
        """
        try:
            _ = self.trainer
        except RuntimeError:
            return
        self.build()

    def on_train_start(self) -> None:
        """Sets a frozen backbone to eval mode; Lightning restores that mode after validation."""
        if self.hparams["freeze"]:
            self.build().trunk.eval()

    def forward(self, batch: Batch) -> Prediction:
        """Predicts the next token and the value of the next number for each sentence."""
        prediction: Prediction = self.build()(batch)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the sum of classification and regression loss."""
        classification, regression = self._losses(self(batch), batch)
        loss = classification + regression
        batch_size = len(batch.target_B)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        self.log("train/one_vs_rest", classification, batch_size=batch_size)
        self.log("train/regression", regression, batch_size=batch_size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss and updates the metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss and updates the metrics."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics of the epoch."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_metrics("test")

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Returns the most probable class and the median of the value, (B,) each."""
        prediction = self(batch)
        best_B = probabilities(prediction.scores_BK, self.heads_config.threshold).argmax(dim=1)
        return best_B, prediction.value_B.loc

    def sample(
        self, batch: Batch, n: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples n values for each sentence, of shape (n, B), differentiable in the weights."""
        loc_B, scale_B = self(batch).value_B
        shape = (n, len(loc_B))
        return cauchy.sample(loc_B.expand(shape), scale_B.expand(shape), generator=generator)

    def configure_optimizers(self) -> Optimizer:
        """Returns AdamW over the trainable parameters."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            parameters, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration of backbone and heads to the checkpoint."""
        checkpoint["network"] = {
            "backbone": asdict(self.backbone_config),
            "heads": asdict(self.heads_config),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the saved network, unless a network exists."""
        if self.network is None:
            self.backbone_config = BackboneConfig(**checkpoint["network"]["backbone"])
            self.heads_config = HeadsConfig(**checkpoint["network"]["heads"])
            self.build()

    def _losses(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the mean classification loss, and the mean regression loss of known numbers."""
        threshold = self.heads_config.threshold
        classification_B = one_vs_rest(
            prediction.scores_BK,
            batch.target_B,
            threshold=threshold,
            form=self.hparams["loss_form"],
        )
        scores_BK = prediction.scores_BK
        p_number_B = cauchy.exceedance(threshold, scores_BK.loc[:, -1], scores_BK.scale[:, -1])
        regression_B = gated_regression(
            prediction.value_B,
            batch.value_B,
            batch.known_B,
            p_number_B,
            hardness=self.hparams["gate"],
        )
        n_numbers = batch.known_B.sum().clamp(min=1)
        regression = self.hparams["regression_weight"] * regression_B.sum() / n_numbers
        return classification_B.mean(), regression

    def _evaluate(self, batch: Batch, stage: Stage) -> None:
        prediction = self(batch)
        loss = torch.stack(self._losses(prediction, batch)).sum()
        self.log(f"{stage}/loss", loss, batch_size=len(batch.target_B), sync_dist=True)
        self._metrics(stage).update(prediction, batch)

    def _metrics(self, stage: Stage) -> CausalMetrics:
        metrics = self.scores[stage]
        assert isinstance(metrics, CausalMetrics)
        return metrics

    def _log_metrics(self, stage: Stage) -> None:
        values = self._metrics(stage).compute()
        self.log_dict({f"{stage}/{name}": value.float() for name, value in values.items()})
        self._metrics(stage).reset()
