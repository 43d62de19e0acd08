"""Architectures in common use, as they are commonly initialised and stepped."""

import torch
from torch import nn
from torch.nn import functional as F

from lit_stability.checks.preflight import Subject


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, the last gain at 0 (Goyal et al. 2017)."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.short = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, stride)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        inner = F.relu(self.norm(self.first(x)))
        return F.relu(self.short(x) + self.last(self.second(inner)))


def resnet():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        *(nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)),
    )


class Encoder(nn.Module):
    """torch's own encoder over padded ids, mean-pooled."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(100, 32, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(20, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions
        return self.head(self.layers(x, src_key_padding_mask=ids == 0).mean(1))


class Decoder(nn.Module):
    """GPT-2's shape: normal draws of 0.02, learnt positions, tied head, causal."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(100, 64), nn.Embedding(20, 64)
        layer = (64, 4, 128, 0.1, F.gelu)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(*layer, batch_first=True, norm_first=True) for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 100, bias=False)
        self.head.weight = self.wte.weight
        for each in self.modules():
            if isinstance(each, (nn.Linear, nn.Embedding)):
                nn.init.normal_(each.weight, std=0.02)

    def forward(self, ids):
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.wte(ids) + self.wpe(torch.arange(length))
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 64, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, ids):
        return self.head(self.lstm(self.tokens(ids))[0][:, -1])


def _next_token(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _classes(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _binary(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def _square(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def _mlp(width=256, outer=1):
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, outer))


def _images():
    return torch.randn(16, 3, 16, 16), torch.randint(10, (16,))


def _rows(labels):
    return torch.randn(64, 20), labels


ZOO = {
    "resnet, adamw": (resnet, _images, _classes, torch.optim.AdamW, 3e-4),
    "resnet, sgd": (resnet, _images, _classes, torch.optim.SGD, 0.1),
    "convolutions": (convolutions, _images, _classes, torch.optim.Adam, 1e-3),
    "encoder": (
        Encoder,
        lambda: (torch.randint(100, (8, 20)), torch.randint(5, (8,))),
        *(_classes, torch.optim.AdamW, 3e-4),
    ),
    "decoder": (
        *(Decoder, lambda: torch.randint(100, (8, 20)), _next_token, torch.optim.AdamW, 6e-4),
    ),
    "recurrent": (
        Recurrent,
        lambda: (torch.randint(100, (8, 20)), torch.randint(5, (8,))),
        *(_classes, torch.optim.Adam, 1e-3),
    ),
    "regression": (
        *(_mlp, lambda: _rows(30 * torch.randn(64, 1)), _square, torch.optim.Adam, 1e-3),
    ),
    "one logit": (
        *(_mlp, lambda: _rows(torch.randint(2, (64, 1)).float()), _binary, torch.optim.Adam, 1e-3),
    ),
    "logistic regression": (
        lambda: nn.Linear(20, 3),
        lambda: (torch.randn(4, 20), torch.randint(3, (4,))),
        *(_classes, torch.optim.SGD, 0.1),
    ),
}
"""Model, batch, step, optimizer and its learning rate."""


def from_zoo(name, seed):
    """A subject whose weights and batch are drawn from a seed."""
    torch.manual_seed(seed)
    make, batch, step, optimizer, lr = ZOO[name]
    model = make()
    return Subject(model, step, batch(), [optimizer(model.parameters(), lr=lr)])
