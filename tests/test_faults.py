import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lit_stability.faults import (
    BadBatch,
    CorruptGradient,
    CorruptMoment,
    CorruptWeight,
    FaultInjector,
    JumpLearningRate,
    NanLoss,
    ScaleGradients,
    ScaleLoss,
)
from tests.conftest import Regression, fit, flat


class Seen(Callback):
    """What a fault did, batch by batch, before anything is updated with it."""

    def __init__(self):
        self.losses, self.grads, self.weights, self.rates, self.moments = [], [], [], [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(float(loss.detach()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append([p.grad.clone() for p in pl_module.parameters()])
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.moments.append([s["exp_avg_sq"].clone() for s in optimizer.state.values()])


def rehearse(tmp_path, fault, **options):
    """The same run without and with a fault, as seen just before each update."""
    runs = []
    for callbacks in ([], [FaultInjector([fault])] if fault else []):
        seen = Seen()
        fit(tmp_path, [*callbacks, seen], lambda: Regression(dropout=0.0), **options)
        runs.append(seen)
    return runs


def test_nan_loss_is_injected_at_its_step_only(tmp_path):
    _, faulty = rehearse(tmp_path, NanLoss(step=5), max_steps=6)
    assert [math.isnan(x) for x in faulty.losses] == [False] * 5 + [True]


def test_loss_spike_scales_loss_and_gradients(tmp_path):
    clean, faulty = rehearse(tmp_path, ScaleLoss(step=5, factor=8192.0), max_steps=6)
    assert faulty.losses[5] == 8192 * clean.losses[5]
    torch.testing.assert_close(faulty.grads[5], [8192 * g for g in clean.grads[5]])


def test_gradient_fault_affects_the_named_parameter_only(tmp_path):
    clean, faulty = rehearse(
        tmp_path, CorruptGradient(step=5, parameter="net.4.weight", value=math.inf), max_steps=6
    )
    changed = [not torch.equal(a, b) for a, b in zip(clean.grads[5], faulty.grads[5], strict=True)]
    assert changed == [False, False, False, False, True, False]
    assert torch.isinf(faulty.grads[5][4]).sum() == 1


def test_scaled_gradients_last_for_their_steps(tmp_path):
    clean, faulty = rehearse(tmp_path, ScaleGradients(step=0, steps=1, factor=1e3), max_steps=2)
    torch.testing.assert_close(faulty.grads[0], [1e3 * g for g in clean.grads[0]])


@pytest.mark.parametrize(
    ("options", "changes_to"),
    [
        ({"value": 7.0}, lambda w: 7.0),
        ({"bit": 31}, lambda w: -w),
        ({"bit": 23}, lambda w: w * 2.0 ** (-1 if math.frexp(w)[1] % 2 else 1)),
    ],
    ids=["value", "sign bit", "lowest exponent bit"],
)
def test_weight_fault_changes_one_element(options, changes_to, tmp_path):
    clean, faulty = rehearse(
        tmp_path, CorruptWeight(step=5, parameter="net.0.weight", **options), max_steps=6
    )
    before, after = clean.weights[5][0].flatten(), faulty.weights[5][0].flatten()
    assert torch.equal(before[1:], after[1:])
    assert float(after[0]) == pytest.approx(changes_to(float(before[0])))


def test_flipped_top_exponent_bit_is_huge(tmp_path):
    _, faulty = rehearse(
        tmp_path, CorruptWeight(step=5, parameter="net.0.weight", bit=30), max_steps=6
    )
    assert float(faulty.weights[5][0].flatten()[0].abs()) > 1e30


def test_moment_fault_overwrites_the_moment(tmp_path):
    _, faulty = rehearse(tmp_path, CorruptMoment(step=5, parameter="net.0.*"), max_steps=6)
    assert [bool((m == 0).all()) for m in faulty.moments[5]] == [True, True] + [False] * 4


@pytest.mark.parametrize("scheduler", [None, "onecycle"])
def test_learning_rate_jump_stays_whatever_the_scheduler_writes(scheduler, tmp_path):
    runs = []
    for faults in ([], [FaultInjector([JumpLearningRate(step=5, factor=3.0)])]):
        seen = Seen()
        fit(tmp_path, [*faults, seen], lambda: Regression(scheduler=scheduler), max_steps=12)
        runs.append(seen.rates)
    clean, faulty = runs
    assert faulty[:5] == clean[:5]
    assert faulty[5:] == pytest.approx([3.0 * x for x in clean[5:]])


def test_bad_batch_of_integers_is_shuffled_not_changed():
    batch = {"tokens": torch.arange(20).view(4, 5)}
    BadBatch(step=0).on_batch(None, None, batch)
    assert not torch.equal(batch["tokens"], torch.arange(20).view(4, 5))
    assert torch.equal(batch["tokens"].flatten().sort().values, torch.arange(20))


def test_fault_for_another_rank_is_not_injected(tmp_path):
    clean, faulty = rehearse(tmp_path, NanLoss(step=5, rank=1), max_steps=8)
    assert clean.losses == faulty.losses


def test_injector_leaves_the_module_as_it_was(tmp_path):
    module, _ = fit(tmp_path, [FaultInjector([NanLoss(step=5)])], max_steps=3)
    assert "training_step" not in vars(module)
    assert torch.isfinite(flat(module)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NanLoss(step=-1), "step must be 0 or more, got -1"),
        (lambda: NanLoss(step=1, steps=0), "steps must be at least 1, got 0"),
        (lambda: CorruptWeight(step=1, bit=32), r"bit must be in 0\.\.31, got 32"),
        (lambda: FaultInjector([]), "faults is empty"),
    ],
)
def test_bad_option_is_refused_with_its_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pattern_that_matches_nothing_lists_the_parameters(tmp_path):
    injector = FaultInjector([CorruptWeight(step=0, parameter="decoder.*")])
    with pytest.raises(ValueError, match=r"no parameter matches 'decoder\.\*'; there are \['net"):
        fit(tmp_path, [injector], max_steps=1)


@pytest.mark.parametrize("fault", [CorruptWeight, CorruptGradient])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fault_changes_one_element_in_any_memory_format(fault, layout, tmp_path):
    module = nn.Conv2d(3, 4, 2).to(memory_format=layout)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    if fault is CorruptWeight:
        CorruptWeight(step=0, parameter="weight").on_batch(None, module, None)
        changed = module.weight
    else:
        CorruptGradient(step=0, parameter="weight").on_gradients(module)
        changed = module.weight.grad
    assert int(changed.isnan().sum()) == 1
