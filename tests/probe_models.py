"""Attention in every form that the probes are to see, and modules to train with it."""

import math

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F


def by_hand(q, k, v, mask=None, dropout=0.0):
    """Softmax of the scaled product; a mask is True where a query may look."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9 if scores.dtype != torch.float16 else -6.5e4)
    return F.dropout(scores.softmax(-1), dropout) @ v


def fused(q, k, v, mask=None, dropout=0.0):
    """Torch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Four heads, with projections."""

    def __init__(self, width=16, attend=fused, dropout=0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attend, self.dropout = attend, dropout

    def forward(self, x, mask=None):
        b, t, d = x.shape
        q, k, v = (y.view(b, t, 4, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = self.attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Attending(LightningModule):
    """Features as tokens through two attentions, one of them by hand, with dropout in each."""

    def __init__(self, rate=1e-2, kind="adamw"):
        super().__init__()
        self.embed = nn.Linear(1, 16)
        self.first = SelfAttention(dropout=0.1)
        self.second = SelfAttention(attend=by_hand, dropout=0.1)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 1))
        self.rate, self.kind, self.losses = rate, kind, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.embed(x[..., None])
        h = h + self.first(h)
        h = h + self.second(h)
        loss = F.mse_loss(self.head(h.mean(1)).squeeze(-1), y)
        self.losses.append(float(loss.detach()))
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), self.rate)
