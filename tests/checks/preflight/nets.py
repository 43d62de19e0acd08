"""Small models for the checks, each healthy as it comes, and a subject made of one."""

import torch
from torch import nn
from torch.nn import functional as F

from lit_stability.checks.preflight import Subject

CLASSES = 10


class Classifier(nn.Module):
    """A trunk of two layers with norms, and a head."""

    def __init__(self, width=32, dropout=0.0, norm=nn.LayerNorm):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Linear(8, width), norm(width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), norm(width), nn.ReLU()),
        )
        self.head = nn.Linear(width, CLASSES)
        for each in self.modules():
            if isinstance(each, nn.Linear):
                nn.init.xavier_normal_(each.weight)
                nn.init.zeros_(each.bias)

    def forward(self, x):
        return self.head(self.trunk(x))


class Attender(nn.Module):
    """One layer of attention over embedded ids, then class scores of each position."""

    def __init__(self, causal=True, invert=False, pad_id=0):
        super().__init__()
        self.causal, self.invert, self.pad_id = causal, invert, pad_id
        self.tokens, self.positions = nn.Embedding(CLASSES, 16), nn.Embedding(12, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, CLASSES)
        for each in (self.tokens, self.positions):
            nn.init.normal_(each.weight, std=0.5)

    def forward(self, ids, attend=None):
        length = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(length))
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = (ids != self.pad_id if attend is None else attend.bool())[:, None, :]
        mask = mask.expand(-1, length, -1)
        if self.causal:
            mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.mT / 4).masked_fill(mask if self.invert else ~mask, -1e9)
        return self.head(x + scores.softmax(-1) @ v)


def seeded(make, *args, seed=0, **kwargs):
    """A model whose weights are the same in every test."""
    torch.manual_seed(seed)
    return make(*args, **kwargs)


def labelled(rows=64, seed=0):
    """Inputs of variance 1, and labels that are one of the classes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=g), torch.randint(CLASSES, (rows,), generator=g)


def classify(model, batch):
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def subject(model=None, batch=None, step=classify, lr=1e-3, optimizer=torch.optim.AdamW):
    """The healthy subject, but for what is given."""
    model = seeded(Classifier) if model is None else model
    weights = [p for p in model.parameters() if p.requires_grad]
    return Subject(model, step, labelled() if batch is None else batch, [optimizer(weights, lr=lr)])


def padded(model):
    """An `Attender` on rows of which two are padded, as their attention_mask says."""
    ids = torch.randint(1, CLASSES, (4, 8), generator=torch.Generator().manual_seed(0))
    attend = torch.ones_like(ids)
    attend[:2, 5:] = 0
    labels = ids.roll(1, 1).masked_fill(attend == 0, -100)

    def step(model, batch):
        scores = model(batch["ids"], batch["attention_mask"])
        return F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten())

    return subject(model, {"ids": ids, "attention_mask": attend, "labels": labels}, step)
