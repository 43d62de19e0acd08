"""The LightningModule that trains the causal classifier and tells how well it does."""

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
from models.causal.losses import Form, gated_regression, one_vs_rest, probabilities
from models.causal.metrics import CausalMetrics
from models.causal.network import CausalClassifier

Stage = Literal["val", "test"]


class CausalModule(pl.LightningModule):
    """Trains the heads, and the embedding of numbers, on a frozen trunk.

    The network is built by the Trainer, by `build` otherwise, and from a checkpoint by
    `load_from_checkpoint`.

    Logged every step: `train/loss`, the sum of the following two, in nats;
    `train/one_vs_rest`, which **starts at K ln 2: 1.05e5 with the 151,937 classes of Qwen and
    no explosion** (`models.causal.losses.guess`); `train/regression`, per sentence after which a
    number comes, times its gate. Logged per epoch, under `val/` and `test/`: `loss`, and the
    figures of `models.causal.metrics.CausalMetrics`.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig | None = None,
        heads: HeadsConfig | None = None,
        freeze: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        loss_form: Form = "stable",
        gate: float = 1.0,
        regression_weight: float = 1.0,
    ) -> None:
        """Choose the network and how it is trained.

        Args:
            backbone: The trunk; None for the embedded one.
            heads: The heads; None for the defaults.
            freeze: Whether the trunk keeps its weights.
            lr: Learning rate of AdamW.
            weight_decay: Of AdamW.
            loss_form: `naive` for the form that saturates; a fault to rehearse.
            gate: 1 for the hard gate of the regression, 0 for the soft one, or between.
            regression_weight: Factor on the regression.
        """
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr={lr} must be greater than 0")
        if not 0.0 <= gate <= 1.0:
            raise ValueError(f"gate={gate} must be from 0, soft, to 1, hard")
        if not regression_weight >= 0.0:
            raise ValueError(f"regression_weight={regression_weight} must be 0 or more")
        if loss_form not in get_args(Form):
            raise ValueError(f"loss_form={loss_form!r} is unknown; choose one of {get_args(Form)}")
        self.save_hyperparameters(ignore=["backbone", "heads"])
        self.backbone_config = backbone or BackboneConfig()
        self.heads_config = heads or HeadsConfig()
        self.network: CausalClassifier | None = None
        self.scores = torch.nn.ModuleDict()

    def build(self) -> CausalClassifier:
        """Build the network, or give the one that is there."""
        if self.network is None:
            network = CausalClassifier(load_backbone(self.backbone_config), self.heads_config)
            if self.hparams["freeze"]:
                network.freeze_trunk()
            threshold = self.heads_config.threshold
            for stage in get_args(Stage):
                self.scores[stage] = CausalMetrics(network.num_id, threshold)
            self.network = network
        return self.network

    def configure_model(self) -> None:
        """Build the network for a Trainer.

        Without one nothing is built: `load_from_checkpoint` calls this before it has told
        which network the checkpoint is of.
        """
        try:
            _ = self.trainer
        except RuntimeError:
            return
        self.build()

    def on_train_start(self) -> None:
        """Take a frozen trunk out of train mode; what Lightning does after validation keeps it."""
        if self.hparams["freeze"]:
            self.build().trunk.eval()

    def forward(self, batch: Batch) -> Prediction:
        """Predict what follows each sentence."""
        prediction: Prediction = self.build()(batch)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the mean loss of a sentence."""
        scores, value = self._losses(self(batch), batch)
        loss = scores + value
        size = len(batch.target_B)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("train/one_vs_rest", scores, batch_size=size)
        self.log("train/regression", value, batch_size=size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take in a batch of validation sentences."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Take in a batch of test sentences."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the epoch."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures of the epoch."""
        self._log_scores("test")

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Give the most probable class and the median of the value, (B,) each."""
        prediction = self(batch)
        best_B = probabilities(prediction.scores_BK, self.heads_config.threshold).argmax(dim=1)
        return best_B, prediction.value_B.loc

    def sample(
        self, batch: Batch, n: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n values of each sentence, (n, B), differentiable in the weights."""
        loc_B, scale_B = self(batch).value_B
        shape = (n, len(loc_B))
        return cauchy.sample(loc_B.expand(shape), scale_B.expand(shape), generator=generator)

    def configure_optimizers(self) -> Optimizer:
        """Build AdamW over what trains."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            parameters, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which network it is, as plain values."""
        checkpoint["network"] = {
            "backbone": asdict(self.backbone_config),
            "heads": asdict(self.heads_config),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that was saved, unless one is there."""
        if self.network is None:
            self.backbone_config = BackboneConfig(**checkpoint["network"]["backbone"])
            self.heads_config = HeadsConfig(**checkpoint["network"]["heads"])
            self.build()

    def _losses(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean over the sentences, and over those after which a number comes."""
        threshold = self.heads_config.threshold
        scores_B = one_vs_rest(
            prediction.scores_BK,
            batch.target_B,
            threshold=threshold,
            form=self.hparams["loss_form"],
        )
        scores_BK = prediction.scores_BK
        p_number_B = cauchy.exceedance(threshold, scores_BK.loc[:, -1], scores_BK.scale[:, -1])
        value_B = gated_regression(
            prediction.value_B,
            batch.value_B,
            batch.known_B,
            p_number_B,
            hardness=self.hparams["gate"],
        )
        n_numbers = batch.known_B.sum().clamp(min=1)
        return scores_B.mean(), self.hparams["regression_weight"] * value_B.sum() / n_numbers

    def _evaluate(self, batch: Batch, stage: Stage) -> None:
        prediction = self(batch)
        size = len(batch.target_B)
        loss = torch.stack(self._losses(prediction, batch)).sum()
        self.log(f"{stage}/loss", loss, batch_size=size, sync_dist=True)
        self._metrics(stage).update(prediction, batch)

    def _metrics(self, stage: Stage) -> CausalMetrics:
        metrics = self.scores[stage]
        assert isinstance(metrics, CausalMetrics)
        return metrics

    def _log_scores(self, stage: Stage) -> None:
        figures = self._metrics(stage).compute()
        self.log_dict({f"{stage}/{name}": each.float() for name, each in figures.items()})
        self._metrics(stage).reset()
