"""Loss of the first and of the later tokens, and metrics of decoded sentences."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import CHRFScore, SacreBLEUScore


class TokenLoss(NamedTuple):
    """Mean cross-entropy per token in nats, as 0-d float32 tensors.

    The first token is separate because it is predicted from the source alone: a network that
    copies its own input or sees the future does well on the later tokens and badly on the first.
    """

    total: Tensor
    """Mean over all tokens except padding."""
    first: Tensor
    """Mean over the first token of each sentence."""
    rest: Tensor
    """Mean over all later tokens; 0 if there are none."""


def token_loss(
    logits_BTV: Tensor, expected_BT: Tensor, *, pad_id: int, label_smoothing: float = 0.0
) -> TokenLoss:
    """Computes the cross-entropy, in float32 whatever the dtype of the logits.

    Args:
        logits_BTV: Logits of any floating-point dtype.
        expected_BT: Expected token ids; `pad_id` is ignored.
        pad_id: Token id of padding.
        label_smoothing: Probability mass spread evenly over the vocabulary.
    """
    loss_BT = F.cross_entropy(
        logits_BTV.float().flatten(0, 1),
        expected_BT.flatten(),
        ignore_index=pad_id,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view_as(expected_BT)
    counted_BT = expected_BT != pad_id
    return TokenLoss(
        _mean(loss_BT, counted_BT),
        _mean(loss_BT[:, :1], counted_BT[:, :1]),
        _mean(loss_BT[:, 1:], counted_BT[:, 1:]),
    )


def _mean(loss_BT: Tensor, counted_BT: Tensor) -> Tensor:
    return loss_BT.sum() / counted_BT.sum().clamp(min=1)


class ExactMatch(Metric):
    """Share of translations equal to one of their references, from 0 to 1."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    n_equal: Tensor
    n_total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Creates the two counters; `kwargs` are passed to `torchmetrics.Metric`."""
        super().__init__(**kwargs)
        self.add_state("n_equal", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("n_total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Counts the exact matches of a batch."""
        self.n_equal += sum(p in references for p, references in zip(preds, target, strict=True))
        self.n_total += len(preds)

    def compute(self) -> Tensor:
        """Returns the share of exact matches; 0 if there were no sentences."""
        return self.n_equal / self.n_total.clamp(min=1)


def translation_metrics(prefix: str) -> MetricCollection:
    """Creates the metrics `exact_match`, `bleu` and `chrf`, each from 0 to 1, named with `prefix`.

    BLEU is sacreBLEU's with its Chinese tokenizer (Post 2018). chrF uses character n-grams up to 6
    and no word n-grams, because Chinese has no spaces (Popović 2015). All take translations and
    lists of references as text.
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
