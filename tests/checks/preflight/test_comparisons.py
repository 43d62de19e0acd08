"""Outputs against labels: shapes, scales, and probabilities that are taken for logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_stability.checks.preflight import Subject, preflight

CHECKS = ("comparisons", "probabilities")


def net(outputs=1, inputs=20):
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


def findings(model, step, *batch):
    """What the checks of this file find on the first batch."""
    optimizers = [torch.optim.Adam(model.parameters(), 1e-3)]
    report = preflight(Subject(model, step, batch, optimizers))
    failed = [why for why in report.skipped.values() if "failed" in why]
    assert not failed
    return [f for f in report.findings if f.check in CHECKS]


def rows(labels):
    torch.manual_seed(0)
    return torch.randn(32, 20), labels(32)


def classes(n):
    return torch.arange(n) % 10


PROBABILITIES = {
    "softmax": lambda m, b: F.cross_entropy(m(b[0]).softmax(-1), b[1]),
    "softmax in a module": lambda m, b: nn.CrossEntropyLoss()(nn.Softmax(-1)(m(b[0])), b[1]),
    "sigmoid": lambda m, b: F.cross_entropy(m(b[0]).sigmoid(), b[1]),
    "softmax over positions": lambda m, b: F.cross_entropy(
        m(b[0]).softmax(-1)[:, :, None].expand(-1, -1, 3), b[1][:, None].expand(-1, 3)
    ),
    "softmax for nll": lambda m, b: F.nll_loss(m(b[0]).softmax(-1), b[1]),
    "softmax for kl": lambda m, b: F.kl_div(
        m(b[0]).softmax(-1), F.one_hot(b[1], 10).float(), reduction="batchmean"
    ),
    "sigmoid twice": lambda m, b: F.binary_cross_entropy_with_logits(
        torch.sigmoid(m(b[0])), F.one_hot(b[1], 10).float()
    ),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_given_to_a_loss_of_logits_are_named_with_the_head(name):
    torch.manual_seed(1)
    (found,) = findings(net(10), PROBABILITIES[name], *rows(classes))
    assert (found.check, found.severity, found.where) == ("probabilities", "error", ("2",))


SPREAD = {
    "mse": lambda m, b: F.mse_loss(m(b[0]), b[1]),
    "l1": lambda m, b: F.l1_loss(m(b[0]), b[1]),
    "huber the other way round": lambda m, b: F.huber_loss(b[1], m(b[0])),
    "module": lambda m, b: nn.SmoothL1Loss()(m(b[0]), b[1]),
    "by hand": lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(),
    "by hand, the other way round": lambda m, b: (b[1] - m(b[0])).abs().mean(),
    "weights of samples": lambda m, b: (
        F.mse_loss(m(b[0]), b[1][:, None], reduction="none") * b[1].abs()
    ).mean(),
}


@pytest.mark.parametrize("name", SPREAD)
def test_outputs_compared_with_the_labels_of_others_are_named(name):
    torch.manual_seed(1)
    (found,) = findings(net(), SPREAD[name], *rows(torch.randn))
    assert (found.check, found.severity, found.where) == ("comparisons", "error", ("2",))
    assert "[32, 1]" in found.what


def test_images_compared_with_the_labels_of_others_are_named():
    model = nn.Conv2d(3, 1, 3, padding=1)
    batch = torch.randn(4, 3, 8, 8), torch.randn(4, 8, 8)
    (found,) = findings(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), *batch)
    assert "[4, 1, 8, 8] and labels [4, 8, 8]" in found.what


class Recurrent(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.rnn = nn.RNN(4, 48, nonlinearity="relu", batch_first=True)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)
        self.head = nn.Linear(48, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def far_head():
    model = net()
    model[2].weight.data.mul_(300.0)
    return model


@pytest.mark.parametrize(
    ("make", "x", "where"),
    [(far_head, (32, 20), "2"), (lambda: Recurrent(2.5), (32, 40, 4), "head")],
    ids=["head", "recurrent gain"],
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_first_outputs_out_of_scale_are_named_with_the_head(make, x, where, by_hand):
    torch.manual_seed(1)

    def step(model, batch):
        out = model(batch[0])
        return ((out - batch[1]) ** 2).mean() if by_hand else F.mse_loss(out, batch[1])

    (found,) = findings(make(), step, torch.randn(*x), torch.randn(32, 1))
    assert (found.check, found.where) == ("comparisons", (where,))


def quantiles(m, b):
    """Quantile regression compares all pairs on purpose, with as many dimensions on both sides."""
    out, target = m(b[0])[:, :8, None], b[1][:, None, None].expand(-1, 1, 8)
    return (out - target).abs().mean()


def contrastive(m, b):
    z = F.normalize(m(b[0]), dim=-1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def pairs(m, b):
    out = m(b[0])[:, 0]
    return F.softplus(
        -(out[:, None] - out[None, :]) * (b[1][:, None] - b[1][None, :]).sign()
    ).mean()


def distilled(m, b):
    with torch.no_grad():
        teacher = m(b[0] * 0.9).softmax(-1)
    return F.kl_div(m(b[0]).log_softmax(-1), teacher, reduction="batchmean")


def gaussian(m, b):
    mean, log_var = m(b[0])[:, :2].unbind(-1)
    return (0.5 * (b[1] - mean) ** 2 / log_var.exp() + 0.5 * log_var).mean()


def policy(m, b):
    logits = m(b[0])
    chosen = logits.log_softmax(-1).gather(1, (b[1] > 0).long()[:, None])[:, 0]
    advantage = b[1] - b[1].mean()
    return -(chosen * advantage).mean() + F.mse_loss(logits[:, 0], b[1])


def gated(m, b):
    out = m(b[0])
    return F.cross_entropy(out * out.sigmoid(), (b[1] > 0).long())


def quantity(scale):
    return lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1] * scale)


HEALTHY = {
    "quantiles": quantiles,
    "contrastive": contrastive,
    "pairs": pairs,
    "distillation": distilled,
    "gaussian": gaussian,
    "policy and value": policy,
    "gate": gated,
    "targets of 1e-4": quantity(1e-4),
    "targets of 1": quantity(1.0),
    "targets of 1e5": quantity(1e5),
    "log-probabilities": lambda m, b: F.nll_loss(m(b[0]).log_softmax(-1), (b[1] > 0).long()),
    "log_softmax for a cross entropy": lambda m, b: F.cross_entropy(
        m(b[0]).log_softmax(-1), (b[1] > 0).long()
    ),
    "many binary labels": lambda m, b: F.binary_cross_entropy_with_logits(
        m(b[0]), (b[0][:, :10] > 0).float()
    ),
    "probabilities for a binary cross entropy": lambda m, b: F.binary_cross_entropy(
        m(b[0]).sigmoid(), (b[0][:, :10] > 0).float()
    ),
    "autoencoder": lambda m, b: F.mse_loss(m(b[0]), b[0][:, :10].sigmoid()),
    "mask of positions": lambda m, b: (m(b[0]) * (b[0][:, :10] > 0)).square().mean(),
    "normalised by columns": lambda m, b: ((m(b[0]) - b[0].mean(0)[:10]) ** 2).mean(),
    "head at zero": lambda m, b: F.cross_entropy(m(b[0]) * 0.0 + m[2].bias, (b[1] > 0).long()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_common_comparisons_are_left_alone(name):
    for seed in range(3):
        torch.manual_seed(seed)
        model, batch = net(10), (torch.randn(32, 20), torch.randn(32))
        assert findings(model, HEALTHY[name], *batch) == []


def test_healthy_recurrent_network_is_left_alone():
    torch.manual_seed(0)
    step = lambda m, b: F.mse_loss(m(b[0]), b[1])  # noqa: E731
    assert findings(Recurrent(1.0), step, torch.randn(32, 80, 4), torch.randn(32, 1)) == []
