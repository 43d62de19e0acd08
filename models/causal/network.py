"""Backbone and heads as one network. Imports only torch."""

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
    """Token and number embedding -> backbone -> abduction -> action.

    The classes are the V rows of the backbone's embedding, followed by `<NUM>`. The backbone is
    the attribute `trunk`, a name that checkpoints contain. Shape suffixes: B batch, L sequence
    length, H hidden size, V vocabulary size of the backbone.
    """

    def __init__(self, backbone: nn.Module, config: HeadsConfig) -> None:
        """Adds new heads to a backbone."""
        super().__init__()
        self.config = config
        self.trunk = backbone
        embedding_VH: Tensor = self._token_embedding().weight
        n_tokens, hidden_size = embedding_VH.shape
        width = config.width or hidden_size
        self.numbers = NumberEmbedding(hidden_size, float(embedding_VH.detach().float().std()))
        self.abduction = AbductionNetwork(hidden_size, width, config.scale_floor)
        self.action = ActionNetwork(width, n_tokens + 1)
        initialise(self.abduction, self.action, config.init)

    @property
    def num_id(self) -> int:
        """Id of `<NUM>`, as a class and as an input token."""
        return self.action.score.out_features - 1

    def freeze_backbone(self) -> None:
        """Freezes the backbone; the number embedding still trains through it."""
        self.trunk.requires_grad_(False)

    def forward(self, batch: Batch) -> Prediction:
        """Predicts the continuation from the last position that is not padding."""
        hidden_BLH = self.trunk(
            inputs_embeds=self._embed(batch), attention_mask=batch.mask_BL.long()
        ).last_hidden_state
        last_B = batch.mask_BL.sum(dim=1) - 1
        rows_B = torch.arange(len(last_B), device=last_B.device)
        hidden_BH = hidden_BLH[rows_B, last_B].to(self.abduction.loc.weight.dtype)
        prediction: Prediction = self.action(self.abduction(hidden_BH))
        return prediction

    def _embed(self, batch: Batch) -> Tensor:
        """Embeds tokens and, at the positions of `<NUM>`, numbers."""
        number_BL = batch.tokens_BL == self.num_id
        embedded_BLH: Tensor = self._token_embedding()(batch.tokens_BL.masked_fill(number_BL, 0))
        numbers_BLH = self.numbers(batch.values_BL, batch.known_BL).to(embedded_BLH.dtype)
        return torch.where(number_BL.unsqueeze(-1), numbers_BLH, embedded_BLH)

    def _token_embedding(self) -> Any:
        return self.trunk.get_input_embeddings()  # type: ignore[operator]
