"""What a measurement sees of a model, and what it leaves as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_stability.checks.precision_ranges import judge, measure_ranges
from lit_stability.measurement.float_formats import BFLOAT16, FLOAT16
from models.translation.attention import MultiHeadAttention
from tests.checks.precision_ranges.examples import Twins, mean_square


def layers(report, kind):
    return [row.layer for row in report.of(kind)]


def test_layer_that_overflows_is_named_and_its_twin_is_not():
    """S9."""
    report = measure_ranges(Twins(), mean_square, [torch.randn(8, 4)])
    verdict = judge(report, FLOAT16)
    assert verdict.fp32_modules == ("hot",)
    assert {one.kind for one in verdict.overflows} == {"weights", "activations"}
    assert judge(report, BFLOAT16).status == "fits"


def test_rows_have_known_answers():
    """y = 2x + 0 on x = (1, -3), loss = mean y^2: dloss/dy = y, dloss/dw = sum x y."""
    model = nn.Sequential(nn.Linear(1, 1))
    nn.init.constant_(model[0].weight, 2.0)
    nn.init.zeros_(model[0].bias)
    report = measure_ranges(model, mean_square, [torch.tensor([[1.0], [-3.0]])] * 2)

    def span(kind, layer):
        row = report.row(kind, layer)
        return row.elements, row.zeros, row.smallest, row.largest

    assert span("weights", "0") == (2, 1, 2.0, 2.0)
    assert span("activations", "(input)") == (4, 0, 1.0, 3.0)
    assert span("activations", "0") == (4, 0, 2.0, 6.0)
    assert span("activations", "(loss)") == (2, 0, 20.0, 20.0)
    assert span("activation gradients", "0") == (4, 0, 2.0, 6.0)
    assert span("weight gradients", "0") == (4, 0, 4.0, 20.0)
    assert report.batches == 2
    assert report.layers == ("(input)", "0", "(loss)")
    with pytest.raises(KeyError, match=r"no activations of '1'; there are \['\(input\)', '0'"):
        report.row("activations", "1")


def test_loss_with_large_targets_is_reported():
    """S9: targets x2000 square to more than fp16 holds, while the model itself fits."""
    x, y = torch.randn(32, 4), 2000 * torch.randn(32, 1)
    report = measure_ranges(
        nn.Linear(4, 1), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), [(x, y)]
    )
    verdict = judge(report, FLOAT16)
    assert [one.layer for one in verdict.overflows] == ["(loss)"]
    assert verdict.overflows[0].largest == pytest.approx(4e6, rel=0.5)
    assert "scale the targets down" in "\n".join(verdict.advice)


def test_inputs_that_overflow_are_distinguished_from_the_layers():
    report = measure_ranges(nn.Linear(4, 1), mean_square, [{"x": 1e5 * torch.ones(2, 4)}["x"]])
    assert report.row("activations", "(input)").overflowing(FLOAT16) == 8


def test_attention_scores_count_as_activations_of_their_module():
    """S9: fp16 dies first where no submodule returns anything, in the product of q and k."""
    attention = MultiHeadAttention(8, 2, attention="manual")
    for projection in (attention.query, attention.key):
        nn.init.constant_(projection.bias, 300.0)
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 1, 5, 5, dtype=torch.bool)

    def step(model, x):
        return model(x, model.project(x), mask).square().mean()

    verdict = judge(measure_ranges(attention, step, [x]), FLOAT16)
    assert [one.layer for one in verdict.overflows] == ["(model)"]
    assert verdict.overflows[0].largest == pytest.approx(4 * 300**2 / 2, rel=0.1)


def test_tensor_handed_on_is_counted_once():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Identity())
    report = measure_ranges(model, mean_square, [torch.randn(3, 4)])
    assert layers(report, "activations") == ["(input)", "0.0", "(loss)"]
    assert report.row("activations", "0.0").elements == 12


def test_shared_weight_is_counted_once_and_belongs_to_the_first():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    report = measure_ranges(model, mean_square, [torch.randn(3, 4)])
    assert layers(report, "weights") == layers(report, "weight gradients") == ["0"]
    assert report.row("weights", "0").elements == 16


def test_frozen_layer_has_weights_and_activations_but_no_gradient():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))
    report = measure_ranges(model, mean_square, [torch.randn(3, 4)])
    assert layers(report, "weights") == ["0", "1"]
    assert layers(report, "weight gradients") == layers(report, "activation gradients") == ["1"]


@pytest.mark.parametrize("seed", range(4))
def test_loss_scale_ends_where_a_backward_pass_in_half_overflows(seed):
    """S9: found in float32, it holds in fp16; one power of two above it a gradient is Inf."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1, bias=False))
    x = torch.randn(64, 8)
    highest = judge(measure_ranges(model, mean_square, [x]), FLOAT16).scale.highest
    model.half()

    def finite(exponent):
        model.zero_grad()
        loss = model(x.half()).float().square().mean()  # as autocast computes losses
        (loss * 2.0**exponent).backward()
        return all(p.grad.isfinite().all() for p in model.parameters())

    assert finite(highest)
    assert not finite(highest + 1)


def test_model_stored_in_half_is_measured_in_float32():
    """S9: in its own format the overflow would be Inf, and not say by how much."""
    model = nn.Linear(4, 4).half()
    nn.init.constant_(model.weight, 30000.0)
    assert model(torch.ones(1, 4).half()).isinf().all()
    row = measure_ranges(model, mean_square, [torch.ones(1, 4)]).row("activations", "(model)")
    assert row.largest == pytest.approx(120000.0, rel=1e-3)
    assert row.non_finite == 0
    assert model.weight.dtype == torch.float16


class Noisy(nn.Module):
    """Draws from every generator, and has a buffer that training moves."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x):
        return self.net(x) * (1 + random.random() + np.random.rand())


def state_of(model):
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    return tensors, grads, hooks, [m.training for m in model.modules()], generators


def assert_same(a, b):
    torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=0)
    assert a[2:4] == b[2:4]
    assert a[4][:2] == b[4][:2]
    assert torch.equal(a[4][2], b[4][2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_measurement_leaves_everything_as_it_was(training, fails):
    """Weights, gradients, buffers, modes, hooks, generators; after an exception too."""
    model = Noisy().train(training)
    model(torch.randn(8, 4)).sum().backward()
    model.net[0].bias.grad = None
    before = state_of(model)

    def step(twin, batch):
        assert twin.net[1].training, "measured as in training"
        loss = mean_square(twin, batch)
        if fails:
            raise RuntimeError("step failed")
        return loss

    batches = (torch.randn(8, 4) for _ in range(2))
    if fails:
        with pytest.raises(RuntimeError, match="step failed"):
            measure_ranges(model, step, batches)
    else:
        measure_ranges(model, step, batches)
    assert_same(state_of(model), before)
    with torch.overrides.BaseTorchFunctionMode():  # no mode of the measurement is left behind
        assert torch.overrides._get_current_function_mode_stack()[:-1] == []


@pytest.mark.parametrize(
    ("step", "batches", "message"),
    [
        (mean_square, [], "batches is empty"),
        (lambda m, x: m(x), [torch.ones(3, 4)], r"step returned shape \(3, 4\); return the loss"),
        (lambda m, x: None, [torch.ones(3, 4)], "step returned None; return the loss"),
        (lambda m, x: m(x).mean().detach(), [torch.ones(3, 4)], "gives the model no gradient"),
    ],
)
def test_bad_step_is_refused_with_what_to_do(step, batches, message):
    with pytest.raises(ValueError, match=message):
        measure_ranges(nn.Linear(4, 4), step, batches)


def test_step_that_calls_another_model_is_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="has to call the model that it receives"):
        measure_ranges(model, lambda _, x: model(x).mean(), [torch.ones(3, 4)])
    assert model.weight.grad is not None, "the step did that, and it is reported"


def test_values_that_are_not_finite_do_not_hide_the_others():
    report = measure_ranges(
        nn.Linear(2, 1), lambda m, x: m(x).nan_to_num().mean(), [torch.tensor([[1.0, torch.inf]])]
    )
    row = report.row("activations", "(input)")
    assert (row.non_finite, row.largest) == (1, 1.0)
