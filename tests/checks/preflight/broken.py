"""Models, batches and steps with one fault each, and the check that is to name it."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.checks.preflight.nets import (
    CLASSES,
    Attender,
    Classifier,
    labelled,
    padded,
    seeded,
    subject,
)


def head_scaled():
    """C5, C3: a head whose first answers are far off."""
    model = seeded(Classifier)
    model.head.weight.data.mul_(300)
    return subject(model)


def head_left_out():
    """C5: a head left out of the initialisation, beside layers initialised otherwise."""
    model = seeded(Classifier, width=64)
    for each in model.trunk:
        if isinstance(each, nn.Linear):
            nn.init.normal_(each.weight, std=0.005)
    torch.manual_seed(1)
    model.head = nn.Linear(64, CLASSES)
    return subject(model)


def extreme_data():
    """C5, N5: data far from normalised."""
    x, y = labelled()
    return subject(batch=(x * 1e5, y))


def nan_data():
    """N5."""
    x, y = labelled()
    x[3, 2] = float("nan")
    return subject(batch=(x, y))


def log_of_zero():
    """C5, S4: the value of a discarded log(0) is finite, its gradient is NaN."""

    def step(model, batch):
        p = model(batch[0]).softmax(-1)
        p = p * (p > p.mean())
        return -torch.where(p > 0, p.log(), 0.0).mean()

    return subject(step=step)


def rate_too_high():
    """C5."""
    return subject(lr=30.0)


def rate_too_low():
    """C5: the model is dead."""
    return subject(lr=1e-12)


def rate_zero():
    """C5."""
    return subject(lr=0.0)


def label_out_of_range():
    """N5: named before a kernel reads it."""
    x, y = labelled()
    y[5] = CLASSES
    return subject(batch=(x, y))


def index_out_of_range():
    """N5."""
    ids = torch.arange(8).repeat(2, 1)
    ids[1, 3] = CLASSES + 2
    return subject(seeded(Attender), ids, lambda m, ids: m(ids).square().mean())


def all_ignored():
    """N5: nothing is learnt from a batch of padding."""
    x, y = labelled()
    return subject(batch=(x, torch.full_like(y, -100)))


def target_visible():
    """The label is among the inputs."""

    class Leak(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([9.0]))

        def forward(self, y):
            return F.one_hot(y, CLASSES) * self.scale

    return subject(Leak(), step=lambda m, b: F.cross_entropy(m(b[1]), b[1]))


def zombie():
    """T2: all gains are zero."""
    model = seeded(Classifier)
    for each in model.modules():
        if isinstance(each, nn.LayerNorm):
            nn.init.zeros_(each.weight)
    return subject(model)


def two_zero_layers():
    """Each keeps the other from learning."""
    model = seeded(Classifier)
    model.trunk[0], model.trunk[1] = nn.Linear(8, 32), nn.Identity()
    model.trunk[4].weight.data.zero_()
    model.trunk[4].bias.data.zero_()
    model.trunk[5] = nn.Identity()
    model.head.weight.data.zero_()
    return subject(model)


def dead_relu():
    """A bias that no input overcomes."""
    model = seeded(Classifier)
    model.trunk[5].bias.data.fill_(-50.0)
    return subject(model)


def detached():
    """The trunk is cut off."""
    return subject(step=lambda m, b: F.cross_entropy(m.head(m.trunk(b[0]).detach()), b[1]))


def not_optimized():
    """The head was made after the optimizer."""
    made = subject()
    made.optimizers[0].param_groups[0]["params"].pop()
    return made


def shared_by_optimizers():
    made = subject()
    made.optimizers = [*made.optimizers, torch.optim.SGD(made.original.head.parameters(), 0.1)]
    return made


def restless_backbone():
    """T4, C1: frozen, and its dropout is active."""
    model = seeded(Classifier, dropout=0.5)
    model.trunk.requires_grad_(False)
    return subject(model)


def restless_statistics():
    model = seeded(Classifier, norm=nn.BatchNorm1d)
    model.trunk.requires_grad_(False)
    return subject(model)


def two_faced():
    """T4: another model in eval mode."""

    class TwoFaced(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 if self.training else 0.5)

    model = seeded(Classifier)
    model.trunk[4] = TwoFaced(32, 32)
    return subject(model)


def drowned_tokens():
    """T1: embeddings that are not scaled drown beside their positions."""
    model = seeded(Attender)
    model.tokens.weight.data.mul_(0.01)
    return subject(model, torch.randint(1, CLASSES, (4, 8)), lambda m, ids: m(ids).square().mean())


def untied_copy():
    model = seeded(Classifier)
    model.other = copy.deepcopy(model.head)
    step = lambda m, b: F.cross_entropy(m(b[0]) + m.other(m.trunk(b[0])), b[1])  # noqa: E731
    return subject(model, step=step)


def raising_step():
    def step(model, batch):
        return model(batch[0][:, :3]).sum()

    return subject(step=step)


def attention_to_nothing():
    """S4: a row of the mask that closes everything."""
    ids = torch.randint(1, CLASSES, (4, 6))
    ids[2] = 0

    def step(model, ids):
        x = model.tokens(ids)
        mask = (ids != 0)[:, None, None, :].expand(-1, 1, 6, -1)
        y = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)
        return y.square().mean()

    return subject(seeded(Attender), ids, step)


def softmax_of_nothing():
    """S4: the NaN row of a softmax written out."""

    def step(model, batch):
        scores = model(batch[0]).masked_fill(batch[1][:, None] == 3, -torch.inf)
        return scores.softmax(-1).square().sum()

    return subject(step=step)


def inverted_padding():
    """T3, by the batch's attention_mask alone."""
    return padded(seeded(Attender, causal=False, invert=True))


BROKEN = [
    (head_scaled, "initial loss", "error", ""),
    (head_scaled, "scales", "warning", "head"),
    (head_left_out, "initialisation", "warning", "head"),
    (extreme_data, "batch", "warning", "batch[0]"),
    (nan_data, "batch", "error", "batch[0]"),
    (nan_data, "initial loss", "error", "trunk.0"),
    (log_of_zero, "operations", "error", "training_step"),
    (log_of_zero, "initial loss", "error", "trunk.0.weight"),
    (rate_too_high, "learning rate", "error", ""),
    (rate_too_low, "learning rate", "error", ""),
    (rate_zero, "learning rate", "error", ""),
    (label_out_of_range, "batch", "error", ""),
    (index_out_of_range, "batch", "error", "tokens"),
    (all_ignored, "targets", "error", ""),
    (target_visible, "initial loss", "warning", ""),
    (zombie, "gains", "error", "trunk.1"),
    (zombie, "constant output", "error", ""),
    (two_zero_layers, "dead branches", "error", "trunk.4"),
    (dead_relu, "dead branches", "error", "trunk.6"),
    (detached, "gradients", "warning", "trunk.0.weight"),
    (not_optimized, "optimizer", "warning", "head.bias"),
    (shared_by_optimizers, "duplicates", "warning", "head.weight"),
    (restless_backbone, "frozen", "warning", "trunk.3"),
    (restless_statistics, "frozen", "warning", "trunk.1"),
    (two_faced, "modes", "warning", "trunk.4"),
    (drowned_tokens, "positions", "warning", "positions"),
    (untied_copy, "copies", "note", "head.weight = other.weight"),
    (raising_step, "step", "error", ""),
    (attention_to_nothing, "operations", "warning", "training_step"),
    (softmax_of_nothing, "operations", "error", "training_step"),
    (inverted_padding, "masks", "error", "attention_mask"),
]
"""The model, the name of the check, its severity, and the first place that it names."""
