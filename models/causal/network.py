"""Trunk and heads as one network. May import torch, and transformers by way of the trunk."""

from typing import Any

import torch
from torch import Tensor, nn

from models.causal.batches import Batch
from models.causal.heads import (
    AbductionNetwork,
    ActionNetwork,
    HeadsConfig,
    NumberEmbedding,
    Prediction,
    initialise,
)


class CausalClassifier(nn.Module):
    """Tokens and numbers -> trunk -> abduction -> action.

    Classes are the rows of the trunk's embedding, and `<NUM>` after the last of them.
    """

    def __init__(self, trunk: nn.Module, config: HeadsConfig) -> None:
        """Put fresh heads on a trunk."""
        super().__init__()
        self.config = config
        self.trunk = trunk
        embedding_VH: Tensor = self._embedding().weight
        n_tokens, trunk_width = embedding_VH.shape
        width = config.width or trunk_width
        self.numbers = NumberEmbedding(trunk_width, float(embedding_VH.detach().float().std()))
        self.abduction = AbductionNetwork(trunk_width, width, config.scale_floor)
        self.action = ActionNetwork(width, n_tokens + 1)
        initialise(self.abduction, self.action, config.init)

    @property
    def num_id(self) -> int:
        """The class, and the input, of a number."""
        return self.action.score.out_features - 1

    def freeze_trunk(self) -> None:
        """Let the trunk keep its weights; a number's embedding still learns through it."""
        self.trunk.requires_grad_(False)

    def forward(self, batch: Batch) -> Prediction:
        """Predict what follows the last position that is not padding."""
        hidden_BLH = self.trunk(
            inputs_embeds=self._embed(batch), attention_mask=batch.mask_BL.long()
        ).last_hidden_state
        last_B = batch.mask_BL.sum(dim=1) - 1
        rows_B = torch.arange(len(last_B), device=last_B.device)
        hidden_BH = hidden_BLH[rows_B, last_B].to(self.abduction.loc.weight.dtype)
        prediction: Prediction = self.action(self.abduction(hidden_BH))
        return prediction

    def _embed(self, batch: Batch) -> Tensor:
        """Look up tokens, and put numbers where they stand."""
        number_BL = batch.tokens_BL == self.num_id
        embedded_BLH: Tensor = self._embedding()(batch.tokens_BL.masked_fill(number_BL, 0))
        numbers_BLH = self.numbers(batch.values_BL, batch.known_BL).to(embedded_BLH.dtype)
        return torch.where(number_BL.unsqueeze(-1), numbers_BLH, embedded_BLH)

    def _embedding(self) -> Any:
        return self.trunk.get_input_embeddings()  # type: ignore[operator]
