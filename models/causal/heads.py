"""Number embedding, abduction network and action network: all layers on top of the backbone.

By the linearity of the Cauchy distribution (`models.causal.cauchy`) the scores S = A U + B and
the value Y = w U + b of U ~ Cauchy^D have loc_S = A loc_U + B, scale_S = abs(A) scale_U, and the
same with w and b. Shape suffixes: B batch, H hidden size of the backbone, D dimension of U,
K number of classes, `<NUM>` included. Imports only torch.
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
    """Configuration of the abduction and action heads.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    width: int | None = None
    """Dimension D of U; None for the hidden size of the backbone."""
    init: Init = "small_gain"
    """`small_gain`: Xavier-uniform with gain 0.1 and biases of 0.01, on both heads. `torch`: the
    default of torch's linear layers. Two deliberate faults: `missed_action` skips the action head,
    `wide` draws every weight with a standard deviation of 10."""
    threshold: float = 0.0
    """Threshold C that the score of a class must exceed."""
    scale_floor: float = 1e-3
    """Added to the scales of U: without it the density at an exactly fitted value is unbounded."""

    def __post_init__(self) -> None:
        if self.init not in get_args(Init):
            raise ValueError(f"init={self.init!r} is unknown; choose one of {get_args(Init)}")
        if self.width is not None and self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1, or null for the trunk's")
        if not self.scale_floor >= 0.0:
            raise ValueError(f"scale_floor={self.scale_floor} must be 0 or more")


class Cauchy(NamedTuple):
    """Locations and scales of Cauchy variables, with the same shape."""

    loc: Tensor
    scale: Tensor


class Prediction(NamedTuple):
    """Output of the action network."""

    scores_BK: Cauchy
    """Score S of each class."""
    value_B: Cauchy
    """Value Y of the next number, if one comes next; its median is `value_B.loc`."""


class NumberEmbedding(nn.Module):
    """Embeds a number x as base + sign(x) log(1 + abs(x)) direction, a missing one separately."""

    def __init__(self, hidden_size: int, std: float) -> None:
        """Draws the vectors with the standard deviation of the backbone's embedding."""
        super().__init__()
        self.base_H = nn.Parameter(torch.randn(hidden_size) * std)
        self.direction_H = nn.Parameter(torch.randn(hidden_size) * std)
        self.missing_H = nn.Parameter(torch.randn(hidden_size) * std)

    def forward(self, values: Tensor, known: Tensor) -> Tensor:
        """Embeds values (...) as (..., H); values that are not known (...) as missing."""
        log_value = values.sign() * torch.log1p(values.abs())
        offset = log_value.unsqueeze(-1) * self.direction_H
        return self.base_H + torch.where(known.unsqueeze(-1), offset, self.missing_H)


class AbductionNetwork(nn.Module):
    """Infers U ~ Cauchy(loc, scale)^D from the backbone's last hidden state."""

    def __init__(self, hidden_size: int, width: int, scale_floor: float) -> None:
        """Creates two linear maps from (H,) to (D,)."""
        super().__init__()
        self.loc = nn.Linear(hidden_size, width)
        self.scale = nn.Linear(hidden_size, width)
        self.scale_floor = scale_floor

    def forward(self, hidden_BH: Tensor) -> Cauchy:
        """Returns locations and scales (B, D); softplus plus the floor keeps scales positive."""
        return Cauchy(self.loc(hidden_BH), F.softplus(self.scale(hidden_BH)) + self.scale_floor)


class ActionNetwork(nn.Module):
    """Maps U linearly to the scores of all classes and to a value."""

    def __init__(self, width: int, n_classes: int) -> None:
        """Creates the linear maps from (D,) to (K,) and to a scalar."""
        super().__init__()
        self.score = nn.Linear(width, n_classes)
        self.value = nn.Linear(width, 1)

    def forward(self, u_BD: Cauchy) -> Prediction:
        """Returns the distributions of S and Y, without sampling."""
        score, value = self.score, self.value
        scores = Cauchy(*cauchy.linear(score.weight, score.bias, u_BD.loc, u_BD.scale))
        loc_B1, scale_B1 = cauchy.linear(value.weight, value.bias, u_BD.loc, u_BD.scale)
        return Prediction(scores, Cauchy(loc_B1.squeeze(-1), scale_B1.squeeze(-1)))


def initialise(abduction: AbductionNetwork, action: ActionNetwork, init: Init) -> None:
    """Initialises the weights of both heads in place according to `HeadsConfig.init`."""
    heads: dict[Init, tuple[nn.Module, ...]] = {
        "small_gain": (abduction, action),
        "torch": (),
        "missed_action": (abduction,),
        "wide": (abduction, action),
    }
    for head in heads[init]:
        for linear in head.modules():
            if isinstance(linear, nn.Linear):
                _initialise_linear(linear, wide=init == "wide")


def _initialise_linear(linear: nn.Linear, *, wide: bool) -> None:
    if wide:
        nn.init.normal_(linear.weight, std=WIDE)
        nn.init.zeros_(linear.bias)
    else:
        nn.init.xavier_uniform_(linear.weight, gain=SMALL_GAIN)
        nn.init.constant_(linear.bias, SMALL_BIAS)
