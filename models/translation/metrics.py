"""How well a translation does: the loss in two parts, and scores of decoded sentences."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import CHRFScore, SacreBLEUScore


class TokenLoss(NamedTuple):
    """Mean cross entropy per token in nats, 0-d float32 tensors.

    The first token is apart because it is written from the source alone: a network that copies
    its own input or sees the future does well on the rest and badly there.
    """

    total: Tensor
    """Over all tokens that are not padding."""
    first: Tensor
    """Over the first token of each sentence."""
    rest: Tensor
    """Over all later tokens; 0 when there are none."""


def token_loss(
    logits_BTV: Tensor, expected_BT: Tensor, *, pad_id: int, label_smoothing: float = 0.0
) -> TokenLoss:
    """Compare logits with the tokens that should follow, in float32 whatever the precision.

    Args:
        logits_BTV: Unnormalised scores, of any floating type.
        expected_BT: The right tokens; `pad_id` marks what does not count.
        pad_id: Token id of padding.
        label_smoothing: Share of the target distribution spread over the vocabulary.
    """
    loss_BT = F.cross_entropy(
        logits_BTV.float().flatten(0, 1),
        expected_BT.flatten(),
        ignore_index=pad_id,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view_as(expected_BT)
    counts_BT = expected_BT != pad_id
    return TokenLoss(
        _mean(loss_BT, counts_BT),
        _mean(loss_BT[:, :1], counts_BT[:, :1]),
        _mean(loss_BT[:, 1:], counts_BT[:, 1:]),
    )


def _mean(loss_BT: Tensor, counts_BT: Tensor) -> Tensor:
    return loss_BT.sum() / counts_BT.sum().clamp(min=1)


class ExactMatch(Metric):
    """Share of hypotheses equal to one of their references, from 0 to 1."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    n_equal: Tensor
    n_total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start at no sentences; `kwargs` are torchmetrics' own."""
        super().__init__(**kwargs)
        self.add_state("n_equal", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("n_total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Count the hypotheses that are right."""
        self.n_equal += sum(p in references for p, references in zip(preds, target, strict=True))
        self.n_total += len(preds)

    def compute(self) -> Tensor:
        """Divide right by all; 0 of 0 is 0."""
        return self.n_equal / self.n_total.clamp(min=1)


def translation_metrics(prefix: str) -> MetricCollection:
    """Build `exact_match`, `bleu` and `chrf`, all from 0 to 1, under names with `prefix`.

    BLEU is sacreBLEU's with its Chinese tokenizer (Post 2018). chrF has character n-grams to 6 and
    no word n-grams, as Chinese writes no spaces (Popović 2015). All take hypotheses and lists of
    references as text.
    """
    return MetricCollection(
        {
            "exact_match": ExactMatch(),
            "bleu": SacreBLEUScore(tokenize="zh"),
            "chrf": CHRFScore(n_word_order=0),
        },
        prefix=prefix,
        compute_groups=False,
    )
