"""What stands on the trunk: numbers as inputs, abduction of U, and action from U.

By the linearity of the Cauchy distribution (`models.causal.cauchy`) the scores S = A U + B and
the value Y = w U + b of U ~ Cauchy^D have loc_S = A loc_U + B, scale_S = abs(A) scale_U, and the
same with w and b. Shape letters: B batch, H width of the trunk, D of U, K classes, `<NUM>`
included. May import torch alone.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.causal import cauchy

Init = Literal["small_gain", "torch", "missed_action", "wide"]
SMALL_GAIN, SMALL_BIAS, WIDE = 0.1, 0.01, 10.0


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The two heads.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    width: int | None = None
    """D, of U; None for that of the trunk."""
    init: Init = "small_gain"
    """`small_gain`: Xavier-uniform with gain 0.1 and biases of 0.01, on both heads. `torch`: as
    torch makes linear layers. Two faults to rehearse: `missed_action` passes over the action head,
    `wide` draws every weight with a standard deviation of 10."""
    threshold: float = 0.0
    """C of every class, which its score has to exceed."""
    scale_floor: float = 1e-3
    """Added to the scales of U: without it the density at a value that is met grows for ever."""

    def __post_init__(self) -> None:
        if self.init not in get_args(Init):
            raise ValueError(f"init={self.init!r} is unknown; choose one of {get_args(Init)}")
        if self.width is not None and self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1, or null for the trunk's")
        if not self.scale_floor >= 0.0:
            raise ValueError(f"scale_floor={self.scale_floor} must be 0 or more")


class Cauchy(NamedTuple):
    """Locations and scales, of one shape."""

    loc: Tensor
    scale: Tensor


class Prediction(NamedTuple):
    """What the action network gives."""

    scores_BK: Cauchy
    """S, by class."""
    value_B: Cauchy
    """Y, the number if one comes next; its median is `value_B.loc`."""


class NumberEmbedding(nn.Module):
    """Embeds a number x as base + sign(x) log(1 + abs(x)) direction; a missing one has its own."""

    def __init__(self, width: int, std: float) -> None:
        """Draw the vectors with the standard deviation of the trunk's embedding."""
        super().__init__()
        self.base_H = nn.Parameter(torch.randn(width) * std)
        self.direction_H = nn.Parameter(torch.randn(width) * std)
        self.missing_H = nn.Parameter(torch.randn(width) * std)

    def forward(self, values: Tensor, known: Tensor) -> Tensor:
        """Embed values (...) as (..., H), and what is not known (...) as missing."""
        size = values.sign() * torch.log1p(values.abs())
        told = size.unsqueeze(-1) * self.direction_H
        return self.base_H + torch.where(known.unsqueeze(-1), told, self.missing_H)


class AbductionNetwork(nn.Module):
    """Infers U ~ Cauchy(loc, scale)^D from what the trunk made of a sentence."""

    def __init__(self, trunk_width: int, width: int, scale_floor: float) -> None:
        """Build two linear maps of (H,) to (D,)."""
        super().__init__()
        self.loc = nn.Linear(trunk_width, width)
        self.scale = nn.Linear(trunk_width, width)
        self.scale_floor = scale_floor

    def forward(self, hidden_BH: Tensor) -> Cauchy:
        """Give locations and scales (B, D); scales are above the floor by the softplus."""
        return Cauchy(self.loc(hidden_BH), F.softplus(self.scale(hidden_BH)) + self.scale_floor)


class ActionNetwork(nn.Module):
    """Maps U to the scores of all classes and to a value, both linearly."""

    def __init__(self, width: int, n_classes: int) -> None:
        """Build the maps of (D,) to (K,) and to one number."""
        super().__init__()
        self.score = nn.Linear(width, n_classes)
        self.value = nn.Linear(width, 1)

    def forward(self, u_BD: Cauchy) -> Prediction:
        """Give the distributions of S and Y, without sampling."""
        score, value = self.score, self.value
        scores = Cauchy(*cauchy.linear(score.weight, score.bias, u_BD.loc, u_BD.scale))
        loc_B1, scale_B1 = cauchy.linear(value.weight, value.bias, u_BD.loc, u_BD.scale)
        return Prediction(scores, Cauchy(loc_B1.squeeze(-1), scale_B1.squeeze(-1)))


def initialise(abduction: AbductionNetwork, action: ActionNetwork, init: Init) -> None:
    """Overwrite the weights of both heads in place, as `HeadsConfig.init` says."""
    heads: dict[Init, tuple[nn.Module, ...]] = {
        "small_gain": (abduction, action),
        "torch": (),
        "missed_action": (abduction,),
        "wide": (abduction, action),
    }
    for head in heads[init]:
        for linear in head.modules():
            if isinstance(linear, nn.Linear):
                _draw(linear, wide=init == "wide")


def _draw(linear: nn.Linear, *, wide: bool) -> None:
    if wide:
        nn.init.normal_(linear.weight, std=WIDE)
        nn.init.zeros_(linear.bias)
    else:
        nn.init.xavier_uniform_(linear.weight, gain=SMALL_GAIN)
        nn.init.constant_(linear.bias, SMALL_BIAS)
