"""Losses of the causal classifier: one-vs-rest classification and gated Cauchy regression.

They are computed in float32 whatever the precision of the model, except the naive form. Shape
suffixes: B batch, K number of classes. Imports only torch.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from models.causal import cauchy
from models.causal.heads import Cauchy

LossForm = Literal["stable", "naive"]


def one_vs_rest(
    scores_BK: Cauchy, target_B: Tensor, *, threshold: float, form: LossForm = "stable"
) -> Tensor:
    """Returns the sum of K binary cross-entropies in nats, for each sentence (B,).

    The probability of class k is P_k = P(S_k > C). The loss is -log P_k for the target and
    -log(1 - P_k) for every other class. Untrained, each term is about ln 2 and the sum about
    K ln 2: 1.05e5 with the vocabulary of Qwen (`loss_at_chance`).

    Args:
        scores_BK: Distributions of the scores.
        target_B: Target classes.
        threshold: Threshold C of the scores.
        form: `naive` takes the logarithm of 1/2 + arctan(x)/pi in the precision of the scores,
            which is -inf from a ratio x of -1e8 on in float32, of -200 on in bfloat16; a
            deliberate fault.
    """
    is_target_BK = torch.zeros_like(scores_BK.loc, dtype=torch.bool)
    is_target_BK.scatter_(1, target_B.unsqueeze(1), True)
    if form == "naive":
        p_BK = cauchy.naive_exceedance(threshold, *scores_BK)
        return -torch.where(is_target_BK, p_BK, 1.0 - p_BK).log().float().sum(dim=1)
    loc_BK, scale_BK = scores_BK.loc.float(), scores_BK.scale.float()
    # P(S < C) = P(-S > -C): the sign lets one call compute both cases.
    sign_BK = torch.where(is_target_BK, 1.0, -1.0)
    return -cauchy.log_exceedance(sign_BK * threshold, sign_BK * loc_BK, scale_BK).sum(dim=1)


def gated_regression(
    value_B: Cauchy, number_B: Tensor, known_B: Tensor, p_number_B: Tensor, *, hardness: float
) -> Tensor:
    """Returns the gated negative log density of the next number in nats, for each sentence (B,).

    It is 0 where no number comes next or the number is missing. Elsewhere its weight is
    a + (1 - a) P_NUM, without a gradient through P_NUM: a hard gate (a = 1) trains the value from
    the first step on, a soft gate (a = 0) in proportion to the predicted probability of `<NUM>`.

    Args:
        value_B: Distributions of the values.
        number_B: Target numbers.
        known_B: True where a number comes next and is not missing.
        p_number_B: Probability P_NUM of `<NUM>`.
        hardness: Hardness a of the gate, from 0 to 1.
    """
    nll_B = -cauchy.log_density(number_B, value_B.loc.float(), value_B.scale.float())
    gate_B = hardness + (1.0 - hardness) * p_number_B.detach().float()
    return torch.where(known_B, gate_B * nll_B, 0.0)


def probabilities(scores_BK: Cauchy, threshold: float) -> Tensor:
    """Returns P(S_k > C) of every class, of shape (B, K); they need not sum to 1."""
    return cauchy.exceedance(threshold, scores_BK.loc.float(), scores_BK.scale.float())


def loss_at_chance(n_classes: int) -> float:
    """Returns the one-vs-rest loss if every probability is 1/2: K terms of ln 2 nats each.

    With the vocabulary of Qwen2.5-0.5B and `<NUM>` that is 151,937 ln 2 = 1.05e5. An initial loss
    above 100,000 is therefore not an explosion but the loss of an untrained model.

    >>> round(loss_at_chance(151_937))
    105315
    """
    return n_classes * math.log(2)
