"""The three ways to start the network: xavier, inner_zero and zombie.

`xavier` is the healthy default: Glorot-uniform matrices, zero biases, unit gains, and embeddings
of standard deviation 1/sqrt(D), so that the first loss is near the logarithm of the vocabulary
size. A tied projection finds each token likest to its own embedding, by about sqrt(D): beyond a
width of 128 the embeddings shrink by sqrt(128/D), which keeps that bias bounded.

`inner_zero` sets the gain of every norm inside a layer to 0 and leaves the final norms at 1: each
sublayer starts as a constant and the signal runs along the residual stream. It trains.

`zombie` sets every gain to 0, the final ones too: the logits start at zero whatever the source,
and only the last norm has a gradient. Under pre-norm the loss stalls for a long while, until
attention wakes up, and the feedforwards never do; under post-norm it stalls for good, at the
frequencies of the tokens at best. It is kept as a fault to rehearse.
"""

import math

from torch import nn

from models.translation.config import TransformerConfig
from models.translation.layers import FeedForward, Residual


def initialise(network: nn.Module, config: TransformerConfig) -> None:
    """Overwrite all weights of `network` in place, as `config.init` says."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # After the matrices: a tied projection is the embedding, and takes the embedding's scale.
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            shrink = min(1.0, math.sqrt(128.0 / config.d_model)) if config.tie_weights else 1.0
            nn.init.normal_(module.weight, std=shrink * config.d_model**-0.5)
    if config.init == "zombie":
        _zero_gains(network)
    elif config.init == "inner_zero":
        _silence_sublayers(network)


def _zero_gains(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.zeros_(module.weight)


def _silence_sublayers(network: nn.Module) -> None:
    """Zero the gains of the inner norms, and give the feedforwards a way out of zero.

    ReLU and SwiGLU have no slope at zero: behind a zero gain and zero biases they would stay
    dead for good, so their hidden biases are drawn as torch draws them by default.
    """
    for module in network.modules():
        if isinstance(module, Residual):
            _zero_gains(module)
        if isinstance(module, FeedForward):
            for linear in filter(None, (module.hidden, module.gate)):
                bound = 1.0 / math.sqrt(linear.in_features)
                nn.init.uniform_(linear.bias, -bound, bound)
