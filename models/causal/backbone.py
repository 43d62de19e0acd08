"""The trunk: a Qwen2 or Qwen3 with its tokenizer, from the hub, from a folder, or made here.

Weights are read from safetensors and no code of a repository is run. May import torch and
transformers.
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
Precision = Literal["float32", "bfloat16"]
_FAMILIES = ("qwen2", "qwen3")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which trunk; the default is made on its first use, in less than a minute on one core.

    Raises:
        ValueError: an option is unknown, missing, or out of its range.
    """

    source: Source = "embedded"
    """`embedded`: a small Qwen2 that knows the embedded sentences. `pretrained`: real weights.
    `random`: a Qwen2 of any shape with random weights, for sizes and times."""
    path: str | None = None
    """For `pretrained`: a folder, or a hub id such as `Qwen/Qwen2.5-0.5B`."""
    revision: str | None = None
    """For a hub id: the commit, 40 hexadecimal digits, as a branch may move."""
    dtype: Precision = "float32"
    """Of the trunk's weights; the heads are float32."""
    vocabulary_size: int = 151_936
    """For `random`; this and the following are those of Qwen2.5-0.5B."""
    width: int = 896
    n_layers: int = 24
    n_heads: int = 14
    n_kv_heads: int = 2
    d_feedforward: int = 4864

    def __post_init__(self) -> None:
        for name, kind in (("source", Source), ("dtype", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {get_args(kind)}")
        if (self.source == "pretrained") != (self.path is not None):
            raise ValueError(
                f"source={self.source!r} with path={self.path!r}: 'pretrained' needs the folder or "
                "the hub id of the weights, the others take none"
            )
        if self.source == "pretrained" and not Path(str(self.path)).expanduser().is_dir():
            self._check_hub()
        if self.source == "random" and (
            self.width % self.n_heads or self.n_heads % self.n_kv_heads
        ):
            raise ValueError(
                f"width={self.width} must be a multiple of n_heads={self.n_heads}, and that of "
                f"n_kv_heads={self.n_kv_heads}"
            )

    def _check_hub(self) -> None:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(self.path)):
            raise ValueError(f"path={self.path!r}: no such folder, and not a hub id")
        if not _COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"path={self.path!r} with revision={self.revision!r}: no such folder; of a hub id "
                "give the commit, 40 hexadecimal digits, so that every run has the same weights"
            )

    @property
    def folder(self) -> str:
        """What `from_pretrained` is given; makes the embedded trunk where it is not there yet."""
        if self.source == "pretrained":
            local = Path(str(self.path)).expanduser()
            return str(local) if local.is_dir() else str(self.path)
        return str(embedded_folder())


def load_tokenizer(config: BackboneConfig) -> Any:
    """Load the tokenizer; a random trunk reads with that of the embedded one."""
    return AutoTokenizer.from_pretrained(config.folder, **_pinned(config))


def load_backbone(config: BackboneConfig) -> nn.Module:
    """Load or build the trunk, without a language-model head.

    A random one draws from torch's global generator.

    Raises:
        ValueError: the weights are not of the Qwen2 or Qwen3 family.
        OSError: they are not there, or not as safetensors.
    """
    dtype = getattr(torch, config.dtype)
    if config.source == "random":
        return _as_module(AutoModel.from_config(_random(config), dtype=dtype))
    found: PretrainedConfig = AutoConfig.from_pretrained(config.folder, **_pinned(config))
    if found.model_type not in _FAMILIES:
        raise ValueError(
            f"path={config.path!r} is a {found.model_type!r}; choose weights of {_FAMILIES}"
        )
    with without_progress_bar():
        return _as_module(
            AutoModel.from_pretrained(
                config.folder, use_safetensors=True, dtype=dtype, **_pinned(config)
            )
        )


def vocabulary_size(config: BackboneConfig) -> int:
    """Rows of the trunk's embedding, which may be more than the tokenizer has tokens."""
    if config.source == "random":
        return config.vocabulary_size
    return int(AutoConfig.from_pretrained(config.folder, **_pinned(config)).vocab_size)


def _pinned(config: BackboneConfig) -> dict[str, Any]:
    return {
        "revision": config.revision or "main",
        "trust_remote_code": False,
        "local_files_only": config.source != "pretrained" or os.path.isdir(config.folder),
    }


def _random(config: BackboneConfig) -> Qwen2Config:
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
    return model.train()  # transformers loads in eval mode, on which Lightning remarks
