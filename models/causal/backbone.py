"""The backbone: a Qwen2 or Qwen3 model and its tokenizer.

The weights come from the Hugging Face hub, from a folder, or from a small model trained here.
They are read from safetensors only, and remote code is never run. Imports torch and transformers.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, Qwen2Config

from models.causal.pretraining import embedded_folder, without_progress_bar

Source = Literal["embedded", "pretrained", "random"]
Dtype = Literal["float32", "bfloat16"]
_FAMILIES = ("qwen2", "qwen3")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Configuration of the backbone; the default is trained on first use, in under a minute.

    Raises:
        ValueError: An option is unknown, missing or out of range.
    """

    source: Source = "embedded"
    """`embedded`: a small Qwen2 trained here on sentences like those of the datamodule.
    `pretrained`: weights from a folder or the hub. `random`: a Qwen2 of any shape with random
    weights, to measure sizes and times."""
    path: str | None = None
    """For `pretrained`: a folder, or a hub id such as `Qwen/Qwen2.5-0.5B`."""
    revision: str | None = None
    """For a hub id: the commit as 40 hexadecimal digits, because a branch may move."""
    dtype: Dtype = "float32"
    """Dtype of the backbone's weights; the heads are float32."""
    vocabulary_size: int = 151_936
    """For `random`, like the following fields; the defaults are those of Qwen2.5-0.5B."""
    width: int = 896
    """Hidden size H."""
    n_layers: int = 24
    n_heads: int = 14
    """Number of query heads."""
    n_kv_heads: int = 2
    """Number of key and value heads (grouped-query attention)."""
    d_feedforward: int = 4864
    """Hidden dimension of the feedforward network."""

    def __post_init__(self) -> None:
        for name, kind in (("source", Source), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {get_args(kind)}")
        if (self.source == "pretrained") != (self.path is not None):
            raise ValueError(
                f"source={self.source!r} with path={self.path!r}: 'pretrained' needs the folder or "
                "the hub id of the weights, the other sources take no path"
            )
        if self.source == "pretrained" and not Path(str(self.path)).expanduser().is_dir():
            self._check_hub()
        if self.source == "random" and (
            self.width % self.n_heads or self.n_heads % self.n_kv_heads
        ):
            raise ValueError(
                f"width={self.width} must be a multiple of n_heads={self.n_heads}, and n_heads a "
                f"multiple of n_kv_heads={self.n_kv_heads}"
            )

    def _check_hub(self) -> None:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(self.path)):
            raise ValueError(f"path={self.path!r}: no such folder, and not a hub id")
        if not _COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"path={self.path!r} with revision={self.revision!r}: no such folder; for a hub id "
                "give the commit, 40 hexadecimal digits, so that every run has the same weights"
            )

    @property
    def folder(self) -> str:
        """Folder or hub id for `from_pretrained`; trains the embedded backbone if it is missing."""
        if self.source == "pretrained":
            local = Path(str(self.path)).expanduser()
            return str(local) if local.is_dir() else str(self.path)
        return str(embedded_folder())


def load_tokenizer(config: BackboneConfig) -> Any:
    """Loads the tokenizer; a random backbone uses that of the embedded backbone."""
    return AutoTokenizer.from_pretrained(config.folder, **_loading_options(config))


def load_backbone(config: BackboneConfig) -> nn.Module:
    """Loads or creates the backbone, without a language-model head.

    A random backbone draws its weights from torch's global generator.

    Raises:
        ValueError: The weights are not of the Qwen2 or Qwen3 family.
        OSError: The weights are missing, or not stored as safetensors.
    """
    dtype = getattr(torch, config.dtype)
    if config.source == "random":
        return _as_module(AutoModel.from_config(_random_config(config), dtype=dtype))
    options = _loading_options(config)
    pretrained: PretrainedConfig = AutoConfig.from_pretrained(config.folder, **options)
    if pretrained.model_type not in _FAMILIES:
        raise ValueError(
            f"path={config.path!r} is a {pretrained.model_type!r}; choose weights of {_FAMILIES}"
        )
    with without_progress_bar():
        return _as_module(
            AutoModel.from_pretrained(config.folder, use_safetensors=True, dtype=dtype, **options)
        )


def vocabulary_size(config: BackboneConfig) -> int:
    """Returns the rows of the backbone's embedding, which may exceed the tokenizer's tokens."""
    if config.source == "random":
        return config.vocabulary_size
    return int(AutoConfig.from_pretrained(config.folder, **_loading_options(config)).vocab_size)


def _loading_options(config: BackboneConfig) -> dict[str, Any]:
    return {
        "revision": config.revision or "main",
        "trust_remote_code": False,
        "local_files_only": config.source != "pretrained" or os.path.isdir(config.folder),
    }


def _random_config(config: BackboneConfig) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=config.vocabulary_size,
        hidden_size=config.width,
        intermediate_size=config.d_feedforward,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        tie_word_embeddings=True,
    )


def _as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model.train()  # transformers loads in eval mode, about which Lightning warns
