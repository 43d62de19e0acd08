"""The losses of the causal classifier: one against the rest, and a gated regression.

They are computed in float32 whatever the precision of the model, but for the naive form. Shape
letters: B batch, K classes. May import torch alone.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from models.causal import cauchy
from models.causal.heads import Cauchy

Form = Literal["stable", "naive"]


def one_vs_rest(
    scores_BK: Cauchy, target_B: Tensor, *, threshold: float, form: Form = "stable"
) -> Tensor:
    """Sum over the classes of K binary cross entropies, in nats, by sentence (B,).

    Class k is called with P_k = P(S_k > C); the loss is -log P_k of the target and
    -log(1 - P_k) of every other. Untrained, each term is about ln 2 and their sum about K ln 2:
    1.05e5 with the vocabulary of Qwen (`guess`).

    Args:
        scores_BK: Distributions of the scores.
        target_B: The class that comes next.
        threshold: C.
        form: `naive` takes the logarithm of 1/2 + arctan(x)/pi in the precision of the scores,
            which is -inf from a ratio x of -1e8 on in float32, of -200 on in bfloat16; a fault to
            rehearse.
    """
    wanted_BK = torch.zeros_like(scores_BK.loc, dtype=torch.bool)
    wanted_BK.scatter_(1, target_B.unsqueeze(1), True)
    if form == "naive":
        p_BK = cauchy.naive_exceedance(threshold, *scores_BK)
        return -torch.where(wanted_BK, p_BK, 1.0 - p_BK).log().float().sum(dim=1)
    loc_BK, scale_BK = scores_BK.loc.float(), scores_BK.scale.float()
    # P(S < C) is P(-S > -C): the sign makes one evaluation of both.
    sign_BK = torch.where(wanted_BK, 1.0, -1.0)
    return -cauchy.log_exceedance(sign_BK * threshold, sign_BK * loc_BK, scale_BK).sum(dim=1)


def gated_regression(
    value_B: Cauchy, number_B: Tensor, known_B: Tensor, p_number_B: Tensor, *, hardness: float
) -> Tensor:
    """Negative log density of the number that comes next, in nats, by sentence (B,).

    Where no number is known to come next it is 0. Elsewhere it counts with the weight
    a + (1 - a) P_NUM, P_NUM without a gradient: a hard gate (a = 1) trains the value from the
    first step on, a soft one (a = 0) as far as the number is foreseen.

    Args:
        value_B: Distributions of the values.
        number_B: The numbers.
        known_B: Where one comes next and is not missing.
        p_number_B: Probability of `<NUM>`.
        hardness: a, from 0 to 1.
    """
    nll_B = -cauchy.log_density(number_B, value_B.loc.float(), value_B.scale.float())
    gate_B = hardness + (1.0 - hardness) * p_number_B.detach().float()
    return torch.where(known_B, gate_B * nll_B, 0.0)


def probabilities(scores_BK: Cauchy, threshold: float) -> Tensor:
    """P(S_k > C) of every class, (B, K); they need not sum to 1."""
    return cauchy.exceedance(threshold, scores_BK.loc.float(), scores_BK.scale.float())


def guess(n_classes: int) -> float:
    """The one-vs-rest loss of a guess: K terms of ln 2 nats each.

    With the vocabulary of Qwen2.5-0.5B and `<NUM>` that is 151,937 ln 2 = 1.05e5. A first loss
    "above 100,000" is therefore no explosion: it is what knowing nothing costs.

    >>> round(guess(151_937))
    105315
    """
    return n_classes * math.log(2)
