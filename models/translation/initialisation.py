"""Weight initialisation of the network: `xavier`, `inner_zero` or `zombie`.

`xavier` is the default: Glorot-uniform matrices, zero biases, unit gains, and embeddings of
standard deviation 1/sqrt(d_model), so that the first loss is near ln(vocabulary size). With tied
weights a token's own embedding raises its logit by about sqrt(d_model); for d_model > 128 the
embeddings are scaled by sqrt(128 / d_model), which bounds that bias.

`inner_zero` sets the gain of every norm inside a layer to 0 and keeps the final norms at 1: each
sublayer starts as a constant and the signal passes along the residual stream. It trains.

`zombie` sets all gains to 0, those of the final norms included: the logits start at zero for every
source, and only the last norm has a gradient. With pre-norm the loss stalls for a long time until
attention starts to learn; the feedforward networks never do. With post-norm it stalls permanently
and learns at best the token frequencies. It is a deliberate fault for experiments.
"""

import math

from torch import nn

from models.translation.config import TransformerConfig
from models.translation.layers import FeedForward, Residual


def initialise(network: nn.Module, config: TransformerConfig) -> None:
    """Initialises all weights of `network` in place according to `config.init`."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # After the linear layers, because a tied projection must have the scale of the embedding.
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            factor = min(1.0, math.sqrt(128.0 / config.d_model)) if config.tie_weights else 1.0
            nn.init.normal_(module.weight, std=factor * config.d_model**-0.5)
    if config.init == "zombie":
        _zero_gains(network)
    elif config.init == "inner_zero":
        _zero_inner_gains(network)


def _zero_gains(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.zeros_(module.weight)


def _zero_inner_gains(network: nn.Module) -> None:
    """Sets the gains of the inner norms to 0 and draws the hidden biases of the feedforwards.

    ReLU and SwiGLU have zero slope at zero: after a zero gain and with zero biases they would
    never train, so their hidden biases use torch's default distribution.
    """
    for module in network.modules():
        if isinstance(module, Residual):
            _zero_gains(module)
        if isinstance(module, FeedForward):
            for linear in filter(None, (module.hidden, module.gate)):
                bound = 1.0 / math.sqrt(linear.in_features)
                nn.init.uniform_(linear.bias, -bound, bound)
