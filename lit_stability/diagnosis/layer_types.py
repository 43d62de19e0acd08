"""The type of layer that a parameter belongs to, by its name: embedding, attention, norm, head.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

LAYER_KINDS: dict[str, tuple[str, ...]] = {
    "norm": ("norm", "ln", "bn", "layernorm", "batchnorm", "rmsnorm", "groupnorm"),
    "positions": ("positions", "pos", "position", "wpe", "positional"),
    "embedding": ("embedding", "embed", "embeddings", "emb", "wte", "tokens", "bytes"),
    "head": ("head", "classifier", "logits", "fc_out", "score"),
    "projection": ("projector", "projection", "connector", "adapter", "bridge", "mm_projector"),
    "attention": (
        *("attention", "attn", "self_attn", "cross_attn", "qkv", "query", "key", "value"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "in_proj"),
    ),
    "vision encoder": (
        *("vision", "vision_model", "vision_tower", "visual", "vit", "image_encoder", "patch"),
        *("resnet", "conv", "stem"),
    ),
    "encoder": ("encoder", "text_encoder", "audio_encoder"),
    "language model": ("lm", "language_model", "decoder", "llm", "transformer", "h", "blocks"),
}
"""Kind of layer -> words in parameter names; the first match counts. May be extended."""


def layer_kind(name: str) -> str | None:
    """Returns the kind of layer that a parameter belongs to, or None if no word matches.

    A word of the table matches a part of the name between dots, without digits at its ends, or the
    beginning or end of that part, as in ``norm1``, ``post_norm`` and ``norm_mlp``.

    Args:
        name: full name of the parameter.

    >>> layer_kind("model.vision_tower.blocks.3.mlp.weight")
    'vision encoder'
    >>> layer_kind("decoder.layers.0.self_attn.out_proj.weight")
    'attention'
    >>> layer_kind("blocks.0.norm1.weight")
    'norm'
    >>> layer_kind("net.0.weight")
    """
    parts = [part.lower().strip("_0123456789") for part in name.split(".")]
    for kind, words in LAYER_KINDS.items():
        if any(_fits(part, word) for part in parts for word in words):
            return kind
    return None


def is_norm_gain(name: str) -> bool:
    """Returns whether the name of a parameter is that of the gain of a norm layer.

    >>> is_norm_gain("blocks.0.norm_mlp.weight"), is_norm_gain("head.weight")
    (True, False)
    """
    module, _, last = name.rpartition(".")
    if last not in ("weight", "gain", "scale", "gamma"):
        return False
    own = module.rpartition(".")[2].lower().strip("_0123456789")
    return any(own.startswith(word) or own.endswith(word) for word in LAYER_KINDS["norm"])


def _fits(part: str, word: str) -> bool:
    return part == word or part.startswith(f"{word}_") or part.endswith(f"_{word}")
