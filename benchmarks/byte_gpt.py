"""Byte-level language model trained on Python's standard library, real data on every machine.

A GPT with pre-norm or post-norm, fused query-key-value projection, causal
`scaled_dot_product_attention`, learnt positions, untied embeddings, and N(0, 1/fan_in) weights; in
pre-norm the residual outputs are divided by sqrt(2 layers).
Shape suffixes: B batch, T time, D model dimension, V vocabulary (256 bytes).
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler


@dataclass(frozen=True, kw_only=True)
class ByteGPTConfig:
    """Hyperparameters of the model."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 64
    dropout: float = 0.0
    post_norm: bool = False
    """Norms after the residual additions (Vaswani et al. 2017), without a final norm."""


class Block(nn.Module):
    """One Transformer layer, pre-norm or post-norm."""

    def __init__(self, config: ByteGPTConfig) -> None:
        super().__init__()
        d = config.width
        self.heads, self.dropout, self.post_norm = config.heads, config.dropout, config.post_norm
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Applies attention and MLP to ``(B, T, D)``."""
        if self.post_norm:
            x_BTD = self.norm_attention(x_BTD + self._drop(self._attention(x_BTD)))
            return self.norm_mlp(x_BTD + self._drop(self._mlp(x_BTD)))
        x_BTD = x_BTD + self._drop(self._attention(self.norm_attention(x_BTD)))
        return x_BTD + self._drop(self._mlp(self.norm_mlp(x_BTD)))

    def _attention(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(x_BTD).chunk(3, -1)
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(b, t, d))
        return attended

    def _mlp(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down(F.gelu(self.up(x_BTD)))
        return out_BTD

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class ByteGPT(nn.Module):
    """GPT over bytes."""

    def __init__(self, config: ByteGPTConfig) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, config.width)
        self.positions = nn.Parameter(torch.zeros(config.length, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Identity() if config.post_norm else nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256)
        self._initialise(config)

    def _initialise(self, config: ByteGPTConfig) -> None:
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                if name.endswith(("out", "down")) and not config.post_norm:
                    std /= math.sqrt(2 * config.layers)
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Returns the logits ``(B, T, V)`` of the next bytes, given bytes ``(B, T)``."""
        x_BTD = self.bytes(bytes_BT) + self.positions[: bytes_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD))
        return logits


class ByteGPTModule(LightningModule):
    """Trains a `ByteGPT` and records the loss of every step in ``losses``.

    Args:
        config: Hyperparameters of the model.
        lr: Learning rate after a linear warm-up.
        warmup: Number of warm-up steps.
        schedule: Additional factor on the learning rate as a function of the step.
        betas: Betas of AdamW.
    """

    def __init__(
        self,
        config: ByteGPTConfig | None = None,
        *,
        lr: float = 1e-3,
        warmup: int = 20,
        schedule: Callable[[int], float] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__()
        self.model = ByteGPT(config or ByteGPTConfig())
        self.lr, self.warmup, self.schedule, self.betas = lr, warmup, schedule, betas
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the cross-entropy of the next byte, in nats."""
        logits_BTV = self.model(batch[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        """Returns AdamW with a warm-up scheduler."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, self.betas, weight_decay=0.0)

        def factor(step: int) -> float:
            extra = 1.0 if self.schedule is None else self.schedule(step)
            return min(1.0, (step + 1) / self.warmup) * extra

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class StandardLibrary(Dataset[Tensor]):
    """Dataset of byte windows from the modules of the standard library.

    Args:
        length: Bytes per window; each item has one more, the last target.
        limit: Maximum number of bytes read.
    """

    def __init__(self, length: int = 64, limit: int = 2_000_000) -> None:
        data = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            data += path.read_bytes()
            if len(data) >= limit:
                break
        self.data = torch.frombuffer(data[:limit], dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.length
        return self.data[start : start + self.length + 1].long()


def loader(batch: int = 16, length: int = 64, seed: int = 0) -> DataLoader[Tensor]:
    """Returns batches of shape ``(batch, length + 1)``, shuffled with a separate generator."""
    data = StandardLibrary(length)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch, sampler=sampler)


@torch.no_grad()
def held_out_loss(module: ByteGPTModule, length: int = 32) -> float:
    """Returns the mean loss in nats per byte over 20 batches, the same for every run."""
    batches = islice(loader(64, length, seed=12345), 20)
    losses = []
    for batch in batches:
        logits_BTV = module.model(batch[:, :-1])
        losses.append(float(F.cross_entropy(logits_BTV.flatten(0, 1), batch[:, 1:].flatten())))
    return sum(losses) / len(losses)
