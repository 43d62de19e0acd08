"""Gradient norms by parameter in, the dead ones out."""

import math

import pytest
import torch
from torch import nn

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, StandardLibrary
from lit_stability.detectors import DeadGradients
from lit_stability.measurement.step_meter import StepMeter
from tests.detectors.streams import anomalies_of, anomalies_with_a_resume, steps_of

NAMES = ("a", "b", "head")


def row(*norms, **fields):
    total = math.sqrt(sum(norm**2 for norm in norms))
    defaults = {"names": NAMES, "grad_norms": norms, "grad_norm": total, "learning_rates": (0.1,)}
    return defaults | fields


LIVE, DEAD = row(1.0, 1.0, 1.0), row(0.0, 0.0, 1.0)
ONE = row(0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([LIVE] * 20, []),
        ([LIVE] * 5 + [DEAD] * 20, [9]),
        # What wakes up after a few steps was a zero-initialised branch.
        ([DEAD] * 4 + [LIVE] * 20, []),
        # An expert that is chosen now and then: ten times its longest rest.
        (([ONE] * 4 + [LIVE]) * 8, []),
        ([ONE] * 4 + [LIVE] + [ONE] * 50, [44]),
        # The second joins the first and is reported separately.
        ([ONE] * 10 + [DEAD] * 10, [4, 14]),
        # Reported again only after a gradient in between, and after ten times as long.
        ([ONE] * 10 + [LIVE] + [ONE] * 120, [4, 110]),
        # Without a learning rate nothing can wake up.
        ([DEAD | {"learning_rates": (0.0,)}] * 20, []),
        # No gradient anywhere is another matter; a NaN neither counts nor clears.
        ([row(0.0, 0.0, 0.0)] * 20, []),
        ([DEAD] * 3 + [row(math.nan, 0.0, 1.0)] * 9 + [DEAD] * 2, [13]),
        # A run has converged when all that is left are rounding errors.
        ([LIVE] * 5 + [row(0.0, 0.0, 1e-7)] * 20, []),
        ([LIVE] * 5 + [row(0.0, 0.0, 1e-3)] * 20, [9]),
        # Underflow is no zero.
        ([row(1e-30, 1e-30, 1.0)] * 20, []),
    ],
)
def test_dead_parameters_of_a_stream_are_reported(rows, expected):
    assert steps_of(anomalies_of(DeadGradients(persist=5), rows)) == expected


@pytest.mark.parametrize(
    ("names", "rows", "expected"),
    [
        # A vector that these data never use stands beside others that are used.
        (("numbers.base", "numbers.missing", "head.w"), [row(1.0, 0.0, 1.0)] * 20, []),
        # It had a gradient once: it died.
        (
            ("numbers.base", "numbers.missing", "head.w"),
            [row(1.0, 1.0, 1.0)] + [row(1.0, 0.0, 1.0)] * 20,
            [5],
        ),
        # All of its module has none.
        (("numbers.base", "numbers.missing", "head.w"), [row(0.0, 0.0, 1.0)] * 20, [4]),
        # A bias lives where the input is 0.
        (("body.weight", "body.bias", "head.w"), [row(0.0, 1.0, 1.0)] * 20, [4]),
    ],
)
def test_unused_vector_of_a_used_module_is_not_dead(names, rows, expected):
    rows = [each | {"names": names} for each in rows]
    assert steps_of(anomalies_of(DeadGradients(persist=5), rows)) == expected
    assert steps_of(anomalies_with_a_resume(lambda: DeadGradients(persist=5), rows, 3)) == expected


def test_parameters_are_named_with_the_first_that_lives_behind_them():
    (anomaly,) = anomalies_of(DeadGradients(persist=5), [DEAD] * 9)
    assert anomaly.layers == (("a", 0.0), ("b", 0.0))
    assert anomaly.value == pytest.approx(2 / 3)
    assert anomaly.signal == "grad_norm"
    assert "2 of 3 parameters, a to b, have" in anomaly.message
    assert anomaly.message.endswith("the next with a gradient is head")
    assert anomaly.warn_only


@pytest.mark.parametrize(
    ("weights", "signal", "first"),
    [
        ((("norm.weight", 0.0), ("norm.bias", 0.0)), "weight_norm", "norm.weight"),
        # A bias of 0 lets gradients pass; a zero that has a gradient is not frozen there.
        ((("norm.weight", 1.0), ("norm.bias", 0.0)), "grad_norm", "a"),
        ((("head", 0.0),), "grad_norm", "a"),
    ],
)
def test_weight_of_zero_that_cannot_move_is_named_first(weights, signal, first):
    rows = [DEAD | {"weight_norms": weights}, *[DEAD] * 9]
    (anomaly,) = anomalies_of(DeadGradients(persist=5), rows)
    assert (anomaly.signal, anomaly.layers[0]) == (signal, (first, 0.0))
    assert (f"{first} is exactly 0 itself" in anomaly.message) is (signal == "weight_norm")


def test_resume_neither_forgets_nor_tells_twice():
    rows = [LIVE] * 5 + [DEAD] * 20
    for at in (3, 7, 10, 20):
        assert steps_of(anomalies_with_a_resume(lambda: DeadGradients(persist=5), rows, at)) == [9]


def run(net, loss_of, steps=40, optimizer=lambda p: torch.optim.AdamW(p, 1e-3)):
    """Really train, and tell of what is dead for 15 steps."""
    optimizer = optimizer(net.parameters())
    meter, rows = StepMeter(net.named_parameters(), optimizer), []
    for i in range(steps):
        optimizer.zero_grad()
        loss = loss_of(i)
        loss.backward()
        rates = [group["lr"] for group in optimizer.param_groups]
        scan = (i + 1) % 10 == 0
        rows.append(meter.measure(i, loss, learning_rates=rates, scan_weights=scan))
        optimizer.step()
    return anomalies_of(DeadGradients(persist=15), rows)


@pytest.mark.parametrize("zeroed", [False, True])
def test_zeroed_final_gain_of_a_transformer_is_named_and_its_twin_is_silent(zeroed):
    """T2: what is upstream of the gain receives exactly 0."""
    torch.manual_seed(0)
    gpt = ByteGPTModule(ByteGPTConfig(width=32, layers=2)).model
    if zeroed:
        nn.init.zeros_(gpt.norm.weight).requires_grad_(False)
    library = StandardLibrary(limit=100_000)
    batches = [torch.stack([library[4 * i + j] for j in range(4)]) for i in range(40)]

    def loss_of(i):
        logits = gpt(batches[i][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batches[i][:, 1:].flatten())

    found = run(gpt, loss_of)
    assert steps_of(found) == ([14] if zeroed else [])
    if zeroed:
        assert found[0].layers[0] == ("norm.weight", 0.0)
        assert found[0].value == pytest.approx(26 / 29)


class ZeroBranch(nn.Module):
    """A residual branch that a gain of 0 keeps shut at first, and one that is detached for good."""

    def __init__(self, detached):
        super().__init__()
        self.inner, self.gain = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
        self.outer, self.detached = nn.Linear(4, 1), detached

    def forward(self, x):
        inner = self.inner(x)
        return self.outer(x + self.gain * (inner.detach() + 0 * inner if self.detached else inner))


@pytest.mark.parametrize(("detached", "expected"), [(False, []), (True, [14])])
def test_branch_of_a_zero_gain_wakes_up_and_a_detached_one_does_not(detached, expected):
    torch.manual_seed(0)
    net = ZeroBranch(detached)
    x = torch.randn(64, 4)
    found = run(net, lambda i: (net(x) - x.sin().sum(1, keepdim=True)).square().mean())
    assert steps_of(found) == expected
    assert all([n for n, _ in a.layers] == ["inner.weight", "inner.bias"] for a in found)


@pytest.mark.parametrize("options", [{"persist": 0}, {"patience": 0.5}])
def test_option_out_of_range_is_refused_and_repeated(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        DeadGradients(**options)
