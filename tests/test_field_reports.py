"""Kinds of trouble, and of healthy practice, that users of Lightning and torch have reported."""

import linecache

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import Preflight, stability_callbacks
from tests.conftest import fit, regression_data

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")

BROKEN = (11, 25)
"""Indices of the batches that are broken, in runs that have some."""


def batches(broken=()):
    """Batches of inputs, targets and weights; one weight of a broken batch is NaN."""
    x, y = regression_data(30).dataset.tensors
    weight = torch.ones(len(x))
    weight[[16 * i + 4 for i in broken]] = torch.nan
    return DataLoader(TensorDataset(x, y, weight), 16)


class Reported(LightningModule):
    """A small net on a weighted regression; may leave out broken batches itself, as a reference."""

    precision, accumulate = "32-true", 1

    def __init__(self, leaves_out=False):
        super().__init__()
        self.leaves_out = leaves_out
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        self.build()

    def build(self):
        """Creates what the kind needs."""

    def predict(self, x):
        return self.net(x)[:, 0]

    def loss(self, x, y, weight):
        return ((self.predict(x) - y).square() * weight).mean()

    def training_step(self, batch, batch_idx):
        if self.leaves_out and batch[2].isnan().any():
            return None
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Validated(Reported):
    """Validates; some practices depend on it."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.mse_loss(self.predict(batch[0]), batch[1]))


def trained(root, callbacks, kind, broken=(), **arguments):
    """Trains two epochs, with validation if the kind has one."""
    options = {"precision": kind.precision, "accumulate_grad_batches": kind.accumulate}
    options |= {"data": batches(broken), "max_steps": -1, "max_epochs": 2}
    if issubclass(kind, Validated):
        options["val"] = regression_data(2, seed=9)
    return fit(root, callbacks, lambda: kind(**arguments), **options)[0]


def same(module, other):
    """Whether all weights and buffers are equal, bit by bit."""
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


class IgnoredLabels(Reported):
    """Cross entropy of a batch in which every label is ignored (pytorch/pytorch 70348)."""

    op, line = "cross_entropy", "cross_entropy"

    def loss(self, x, y, weight):
        labels = (y > 0).long() + 2 * (x[:, 0] > 0).long()
        if weight.isnan().any():
            labels = torch.full_like(labels, -100)
        return F.cross_entropy(self.net(x), labels)


class MaskedRow(Reported):
    """Attention in which a sample is all padding: NaN only in backward (pytorch/pytorch 41508)."""

    op, line = "softmax", "self.attention("

    def build(self):
        self.embed = nn.Linear(1, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def loss(self, x, y, weight):
        padding = (torch.arange(8) > 4).expand(len(x), 8) | weight.isnan()[:, None]
        h = self.embed(x[..., None])
        h = h + self.attention(h, h, h, key_padding_mask=padding)[0]
        return F.mse_loss(self.net(torch.where(padding[..., None], 0.0, h).sum(1))[:, 0], y)


class UnusedBranch(Reported):
    """`torch.where` with an infinite slope in the branch not taken (pytorch/pytorch 187297)."""

    op, line = "sqrt", ".sqrt()"

    def loss(self, x, y, weight):
        out = self.predict(x) * torch.where(weight.isnan(), 0.0, 1.0)
        size = torch.where(out != 0, out.square().sqrt(), out)
        return F.mse_loss(size, y.abs())


class MaskedActions(Reported):
    """Entropy of a policy with an illegal action at -inf (pytorch/pytorch 40553)."""

    op, line = "mul", "logp.exp() * logp"

    def loss(self, x, y, weight):
        illegal = weight.isnan()[:, None] & (torch.arange(4) == 3)
        logp = self.net(x).masked_fill(illegal, -torch.inf).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return -(logp[:, 0] * y.clamp(0, 1)).mean() - 0.1 * entropy.mean()


TROUBLES = [IgnoredLabels, MaskedRow, UnusedBranch, MaskedActions]


@pytest.mark.parametrize("kind", TROUBLES)
def test_batch_that_makes_a_nan_is_left_out_and_its_line_is_named(kind, tmp_path):
    suite = stability_callbacks()
    reference = trained(tmp_path / "bare", [], kind, BROKEN, leaves_out=True)
    module = trained(tmp_path / "suite", suite, kind, BROKEN)
    assert same(module, reference)
    assert {i.cause for i in suite[0].incidents} == {"bad batch"}
    for origin in (i.origin for i in suite[0].incidents):
        assert origin.op == kind.op
        assert kind.line in linecache.getline(origin.file, origin.line)


class MissingTargets(Reported):
    """Missing inputs and targets as NaN, selected away by a mask (pytorch/pytorch 89543)."""

    def loss(self, x, y, weight):
        x = torch.where(torch.arange(8) == 2, torch.nan, x)
        y = torch.where(torch.arange(len(y)) % 3 == 0, torch.nan, y)
        known = ~y.isnan()
        return super().loss(x.nan_to_num()[known], y[known], weight[known])


class FakeQuantised(Reported):
    """Observers whose limits start at inf; one stays there (pytorch-lightning 8507)."""

    def build(self):
        limits = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
        self.inputs = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.weights = FakeQuantize(MinMaxObserver, **limits)
        self.unused = MinMaxObserver()

    def predict(self, x):
        h = F.linear(self.inputs(x), self.weights(self.net[0].weight), self.net[0].bias)
        return self.net[1:](h)[:, 0]


class ComplexWeights(Reported):
    """Complex weights in the frequency domain (google-deepmind/optax 144)."""

    def build(self):
        self.spectrum = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64) / 4)

    def predict(self, x):
        mixed = torch.fft.rfft(x) @ self.spectrum
        return self.net(torch.cat([mixed.real, mixed.imag], -1))[:, 0]


class QuantisedBase(Reported):
    """A low-rank adapter on frozen int8, fp8 and bool weights (huggingface/transformers 32943)."""

    def build(self):
        frozen = {
            "integers": torch.randint(-127, 128, (8, 8), dtype=torch.int8),
            "fp8": torch.randn(8).to(torch.float8_e4m3fn),
            "mask": torch.arange(8) > 0,
        }
        for name, tensor in frozen.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("scale", torch.full((8,), 0.5).to(torch.float8_e4m3fn))
        self.down = nn.Parameter(torch.randn(8, 2) / 8)
        self.up = nn.Parameter(torch.zeros(2, 8))

    def predict(self, x):
        weight = self.integers.float() / 127 * self.scale.float() + self.down @ self.up
        return super().predict(x @ weight * self.mask + self.fp8.float())


class ValidatedCentre(Validated):
    """Tensors made in validation are inference tensors (pytorch-lightning 14497)."""

    def build(self):
        self.register_buffer("centre", torch.zeros(8))

    def predict(self, x):
        return super().predict(x - self.centre)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.centre = batch[0].mean(0)


class Lazy(Validated):
    """Lazy modules, which get their shapes from the sanity check (pytorch-lightning 13764)."""

    def build(self):
        self.net = nn.Sequential(
            nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1)
        )


class EmptyValidation(Validated):
    """A validation metric that is NaN, in a healthy training (pytorch-lightning 1008)."""

    def validation_step(self, batch, batch_idx):
        super().validation_step([part[:0] for part in batch], batch_idx)


class IncompleteWindow(Reported):
    """Epochs that end within an accumulation window (pytorch-lightning 19987)."""

    accumulate = 8


HEALTHY = [
    MissingTargets,
    FakeQuantised,
    ComplexWeights,
    QuantisedBase,
    ValidatedCentre,
    Lazy,
    EmptyValidation,
    IncompleteWindow,
]


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_practice_ends_with_the_weights_of_the_bare_run(kind, tmp_path):
    suite = stability_callbacks()
    bare = trained(tmp_path / "bare", [], kind)
    module = trained(tmp_path / "suite", suite, kind)
    assert same(module, bare)
    assert suite[0].incidents == []


@pytest.mark.parametrize("kind", [k for k in HEALTHY if k is not IncompleteWindow])
def test_broken_batch_is_left_out_of_a_healthy_practice(kind, tmp_path):
    suite = stability_callbacks()
    reference = trained(tmp_path / "bare", [], kind, BROKEN, leaves_out=True)
    module = trained(tmp_path / "suite", suite, kind, BROKEN)
    assert same(module, reference)
    assert {i.cause for i in suite[0].incidents} == {"bad batch"}
    assert len(suite[0].incidents) == 4


class Unvalidated(Reported):
    """Lazy modules that the first batch gives their shapes."""

    build = Lazy.build


class StepsInBackward(Reported):
    """Each weight has an optimizer of its own, which steps in the backward pass (torchtune)."""

    def build(self):
        for p in self.net.parameters():
            optimizer = torch.optim.SGD([p], 1e-2)
            p.register_post_accumulate_grad_hook(lambda p, own=optimizer: steps(own))

    def configure_optimizers(self):
        return None


def steps(optimizer):
    optimizer.step()
    optimizer.zero_grad()


class TrainsATensor(Reported):
    """Optimizes a tensor that is no parameter, as an inverse problem does."""

    def build(self):
        self.shift = [torch.zeros(8, requires_grad=True)]

    def predict(self, x):
        return super().predict(x + self.shift[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.shift, 1e-2)


UNWATCHABLE = {
    Unvalidated: "net.0.weight has no shape yet",
    StepsInBackward: "StepsInBackward returned no optimizer",
    TrainsATensor: "optimizer 0 (SGD) holds no parameter of TrainsATensor",
}


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None")
@pytest.mark.parametrize("kind", UNWATCHABLE)
def test_fit_that_cannot_be_watched_goes_on_as_without_the_suite(kind, tmp_path, caplog):
    """And the next fit of the same callbacks is watched."""
    suite = [Preflight(), *stability_callbacks()]
    bare = trained(tmp_path / "bare", [], kind)
    module = trained(tmp_path / "suite", suite, kind)
    assert same(module, bare)
    assert torch.equal(module.predict(torch.ones(2, 8)), bare.predict(torch.ones(2, 8)))
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "goes on without the suite" in line
    assert UNWATCHABLE[kind] in line
    assert not list((tmp_path / "suite").rglob("*.*"))

    trained(tmp_path / "next", suite, Reported, BROKEN)
    assert len(suite[1].incidents) == 4


def test_adam_in_fp16_whose_epsilon_underflows_stays_finite(tmp_path):
    """A unit without gradient, and an epsilon of 0: 0 / 0 in the update (pytorch/pytorch 8860)."""

    class DeadUnit(Reported):
        def build(self):
            nn.init.constant_(self.net[0].bias[3], -100.0)

        precision = "16-true"

    bare = trained(tmp_path / "bare", [], DeadUnit)
    module = trained(tmp_path / "suite", stability_callbacks(), DeadUnit)
    assert any(p.isnan().any() for p in bare.parameters())
    assert all(p.isfinite().all() for p in module.parameters())


class Empty(Reported):
    def build(self):
        self.none = nn.Parameter(torch.zeros(0, 8))

    def predict(self, x):
        return super().predict(x) + self.none.sum()


def test_parameter_without_elements_is_not_called_dead(tmp_path):
    suite = stability_callbacks()
    fit(tmp_path, suite, Empty, batches(), max_steps=80, max_epochs=-1)
    assert suite[0].incidents == []
